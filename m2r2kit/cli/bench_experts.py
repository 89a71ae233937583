"""`m2r2kit bench experts`: compare ways of streaming experts, or estimate their speed with `--plan`."""

import argparse
import sys

from tqdm import tqdm

from ..bench import measured
from ..bench.experts import ARMS, Disk, compare
from ..bench.questions import questions
from ..common import UserError
from ..experts.decode import StreamedModel
from ..model.backbone import Backbone
from ..text import prompts as prompt_files
from . import shared
from .result import check_result, keep, model_name
from .values import shares


def arguments(parser):
    shared.model(parser, shared.MOE)
    shared.store(parser)
    parser.add_argument(
        "--budgets",
        type=shares,
        default=[0.125, 0.25, 0.5],
        metavar="A,B,..",
        help="shares of all experts to keep in memory (default: 12.5%%,25%%,50%%)",
    )
    shared.streaming(parser)
    shared.prompts(parser, 2)
    shared.max_tokens(parser, 64)
    shared.repeats(parser, 5)
    parser.add_argument(
        "--resident",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also run the model with all experts in memory; --no-resident if it does not fit",
    )
    shared.result(parser)
    parser.add_argument(
        "--plan",
        nargs="?",
        const="all",
        metavar="MODEL",
        help="estimate streaming speed for a known model (default: all of them) without running it",
    )


def run(args) -> int:
    """Measure, print a table, and with `--record` add a record. 1 if an arm's text differs."""
    check_result(args, "experts")
    if args.plan:
        from . import plan

        return plan.run(args)
    if not args.experts:
        raise UserError("Give the experts with --experts STORE, or use --plan.")
    quiet = not sys.stderr.isatty()
    prompts = prompt_files.read(args.prompts or prompt_files.ALL)
    prompts = prompt_files.first_of_each_kind(prompts, args.limit)
    model = StreamedModel(args.model, args.experts)
    manifest = model.store.manifest
    if any(round(share * manifest.experts) < manifest.top_k for share in args.budgets):
        raise UserError(
            f"A token runs {manifest.top_k} of {manifest.experts} experts; a budget of "
            f"{min(args.budgets):.1%} does not hold them."
        )
    whole = Backbone.load(args.model) if args.resident else None
    if whole:
        asked = questions(whole, prompts, args.max_tokens)
        prompts, ids = asked.prompts, asked.ids
    else:
        ids = [model.backbone.encode(p.prompt) for p in prompts]
    disk = Disk(args.reads, args.threads, args.link)
    total = len(ids) * len(ARMS) * (args.repeats + 1) * len(args.budgets)
    with tqdm(total=total, unit="text", leave=False, disable=quiet) as bar:
        figures = compare(
            model, args.model, ids, args.budgets, disk, args.max_tokens, args.repeats,
            args.distance, args.width, whole, lambda: bar.update(),
        )  # fmt: skip
    print(*measured.experts(figures), sep="\n\n")
    settings = {
        "model": model_name(args.model),
        "model_sha256": model.backbone.sha256,
        "dtype": manifest.dtype,
        "record_bytes": manifest.record_bytes,
        "reads": args.reads,
        "threads": args.threads,
        "link": args.link,
        "distance": args.distance,
        "width": args.width or manifest.top_k,
        "max_tokens": args.max_tokens,
        "repeats": args.repeats,
        "prompts": len(ids),
        "limit": args.limit,
        "resident": args.resident,
    }
    keep(args, "experts", settings, figures, prompts)
    arms = [arm for budget in figures["budgets"] for arm in budget["arms"].values()]
    return 0 if figures["resident_equal"] is not False and all(arm["equal"] for arm in arms) else 1
