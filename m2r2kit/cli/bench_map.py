"""`m2r2kit bench map`: the predicted speed-up for each exit and draft length."""

import sys

from tqdm import tqdm

from ..bench.exit_map import exit_map
from ..bench.questions import questions
from ..bench.tables import Table
from ..model.backbone import Backbone
from ..speculation.registry import DRAFTS, ready, stream_folder
from ..stream import checkpoints
from ..stream.stream import StreamConfig
from ..text import prompts as prompt_files
from . import shared
from .result import check_result, keep, model_name
from .values import counts, number


def arguments(parser):
    shared.model(parser)
    shared.stream(parser)
    parser.add_argument(
        "--method",
        choices=("early-exit", "m2r2"),
        default="early-exit",
        help="what drafts: the bare residual at any exit, or the stream at its own (default: early-exit)",
    )
    parser.add_argument(
        "--exits",
        type=counts,
        metavar="E,F,..",
        help="exits to map, in blocks (default: eight depths for early-exit, the stream's exits for m2r2)",
    )
    parser.add_argument(
        "--drafts", type=number(int, 2, 16), default=8, metavar="K", help="longest draft (default: 8)"
    )
    shared.prompts(parser)
    shared.max_tokens(parser, 64)
    shared.result(parser)


def run(args) -> int:
    """Measure, print the map, and with `--record` add a record. 1 if the text of an exit differs."""
    check_result(args, "speculation-map")
    prompts = prompt_files.first_of_each_kind(prompt_files.read(args.prompts or prompt_files.ALL), args.limit)
    backbone = Backbone.load(args.model)
    folder = stream_folder(args.model, args.stream)
    exits = args.exits or default_exits(backbone, args.method, folder)
    drafters = {exit: ready(args.method, backbone, folder, None, exit, DRAFTS)[0] for exit in exits}
    quiet = not sys.stderr.isatty()
    asked = questions(backbone, tqdm(prompts, unit="prompt", leave=False, disable=quiet), args.max_tokens)
    if asked.left_out:
        print(asked.left_out)
    with tqdm(total=len(exits) * len(asked.ids), unit="text", disable=quiet) as bar:
        figures = exit_map(backbone, drafters, asked.ids, args.drafts, args.max_tokens, lambda: bar.update())
    print(table(figures))
    settings = {
        "model": model_name(args.model),
        "model_sha256": backbone.sha256,
        "method": args.method,
        "max_tokens": args.max_tokens,
        "prompts": len(asked.prompts),
        "left_out": asked.too_long + asked.no_template,
        "limit": args.limit,
    }
    keep(args, "speculation-map", settings, figures, asked.prompts)
    return 0 if all(row["equal"] for row in figures["rows"]) else 1


def default_exits(backbone: Backbone, method: str, stream) -> list[int]:
    """The exits of the trained stream; for `early-exit`, eight depths up to two thirds of the model."""
    if method == "m2r2":
        return list(checkpoints.read_settings(stream, "stream", StreamConfig)[0].exits)
    return sorted({max(1, backbone.depth * part // 24) for part in (1, 2, 3, 4, 6, 8, 12, 16)})


def table(figures: dict) -> Table:
    """One line per exit: its speed-up with 1, 2, .. drafts."""
    rows = []
    for row in figures["rows"]:
        speeds = row["predicted_speedup"]
        cells = [f"{s:.2f}" for s in speeds] if speeds else ["differs"] * len(figures["drafts"])
        rows.append((str(row["exit"]), f"{row['draft_cost']:.2f}", *cells))
    return Table(("exit", "c", *(f"k = {k}" for k in figures["drafts"])), rows)
