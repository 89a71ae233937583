"""`m2r2kit bench speculation`: compare drafting methods, outputs first, then interleaved time."""

import sys

from tqdm import tqdm

from ..bench import measured
from ..bench.questions import questions
from ..bench.speculation import Arm, compare
from ..common import UserError
from ..model.backbone import Backbone
from ..speculation.decode import MOST_DRAFTS
from ..speculation.registry import DRAFTS, METHODS, drafters_folder, ready, stream_folder, training
from ..text import prompts as prompt_files
from . import shared
from .result import check_result, keep, model_name
from .values import some_of


def arguments(parser):
    shared.model(parser)
    shared.prompts(parser)
    parser.add_argument(
        "--methods",
        type=some_of(METHODS),
        default=list(METHODS)[:4],
        metavar="A,B,..",
        help=f"methods to compare, among {', '.join(METHODS)}, or all (default: the first four); plain is "
        "always included",
    )
    shared.drafting(parser)
    shared.repeats(parser, 5)
    shared.result(parser)
    shared.explain(parser, methods=METHODS)


def run(args) -> int:
    """Measure, print a table, write `--json`, and with `--record` add a record. 1 if an arm differs."""
    check_result(args, "speculation")
    quiet = not sys.stderr.isatty()
    prompts = prompt_files.read(args.prompts or prompt_files.ALL)
    prompts = prompt_files.first_of_each_kind(prompts, args.limit)
    backbone = Backbone.load(args.model)
    folders = stream_folder(args.model, args.stream), drafters_folder(args.model, args.drafters)
    if args.draft is not None and not 1 <= args.draft <= MOST_DRAFTS:
        raise UserError(f"The number of drafts must lie between 1 and {MOST_DRAFTS}; got {args.draft}.")
    names = args.methods if "plain" in args.methods else ["plain", *args.methods]
    arms = []
    for name in names:
        drafter, drafts = None, 0
        if name != "mlx_lm":
            drafter, drafts = ready(name, backbone, *folders, args.exit, args.draft)
        arms.append(Arm(name, drafter, drafts, training(name, *folders)))
    drafts = args.draft or next((arm.drafts for arm in arms if arm.name == "m2r2"), DRAFTS)
    asked = questions(backbone, tqdm(prompts, unit="prompt", leave=False, disable=quiet), args.max_tokens)
    if asked.left_out:
        print(asked.left_out)
    rounds = len(asked.ids) * len(arms) * (args.repeats + 1)
    with tqdm(total=rounds, unit="text", disable=quiet) as bar:
        figures = compare(
            backbone,
            arms,
            asked.ids,
            [p.kind for p in asked.prompts],
            args.max_tokens,
            args.repeats,
            lambda: bar.update(),
        )
    print(*measured.speculation(figures), sep="\n\n")
    settings = {
        "model": model_name(args.model),
        "model_sha256": backbone.sha256,
        "exit": next((exit for exit in map(drafts_at, arms) if exit), None),
        "drafts": drafts,
        "max_tokens": args.max_tokens,
        "repeats": args.repeats,
        "prompts": len(asked.prompts),
        "left_out": asked.too_long + asked.no_template,
        "limit": args.limit,
    }
    keep(args, "speculation", settings, figures, asked.prompts)
    return 0 if all(arm.equal for arm in arms) else 1


def drafts_at(arm: Arm) -> int:
    """The depth at which an arm drafts; 0 if its drafter runs no block of the model.

    For M2R2 it is the depth of p, one more than the slow blocks that a draft runs.
    """
    return getattr(arm.drafter, "read_at", arm.drafter.exit) if arm.drafts else 0
