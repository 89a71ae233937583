"""`m2r2kit bench memory`: a model under a budget, in a process whose peak the system says."""

from ..bench.memory import measure
from ..experts.store import Store
from ..model.folder import model_folder
from . import shared
from .result import check_result, keep, model_name
from .values import size


def arguments(parser):
    shared.model(parser)
    shared.store(parser, required=True)
    shared.memory(parser, 0.1)
    parser.add_argument(
        "--most",
        type=size,
        default=10**9,
        metavar="SIZE",
        help="fail if the peak memory of the process exceeds this (default: 1GB)",
    )
    parser.add_argument(
        "--predictor",
        choices=("nothing", "previous", "next-router"),
        default="next-router",
        help="predicts the experts to prefetch (default: next-router)",
    )
    shared.disk(parser)
    parser.add_argument(
        "--prompt",
        default="The sea was calm, and the ship lay at anchor near the old harbour.",
        metavar="TEXT",
        help="text to continue",
    )
    shared.max_tokens(parser, 128)
    shared.result(parser)


def run(args) -> int:
    """Measure, print, and with `--record` add a record. 1 if the texts differ, or the peak is above
    `--most`."""
    check_result(args, "experts-large")
    store = Store(args.experts)  # what is wrong is said before anything starts
    folder = model_folder(args.model)
    store.belongs_to(store.model_sha256(folder))
    more = ["--predictor", args.predictor, "--reads", args.reads, "--threads", str(args.threads)]
    figures = measure(str(folder), args.experts, str(args.budget), args.prompt, args.max_tokens, more)
    print(in_words(figures))
    m = store.manifest
    settings = {
        "model": model_name(args.model), "model_sha256": m.model_sha256, "dtype": m.dtype,
        "blocks": len(m.blocks), "experts": m.experts, "top_k": m.top_k, "record_bytes": m.record_bytes,
        "budget": args.budget, "predictor": args.predictor, "reads": args.reads,
        "threads": args.threads, "prompt": args.prompt, "max_tokens": args.max_tokens,
    }  # fmt: skip
    keep(args, "experts-large", settings, figures)
    if not figures["equal"]:
        print("The texts differ.")
    return 0 if figures["equal"] and figures["streamed"]["peak_bytes"] <= args.most else 1


def in_words(figures: dict) -> str:
    """A few lines."""
    streamed, whole, routing = figures["streamed"], figures["whole"], figures["routing"]
    lines = [
        f"{figures['model_bytes'] / 1e9:.2f} GB of weights, {figures['tokens']} tokens, "
        + ("equal in both:" if figures["equal"] else "which DIFFER:")
    ]
    for name, arm in (("experts on disk", streamed), ("all in memory", whole)):
        lines.append(
            f"{name:16} peak {arm['peak_bytes'] / 1e6:7.0f} MB, {arm['tokens_per_second']:6.2f} tokens/s, "
            f"{arm['wall_seconds']:.1f} s from start to end"
        )
    lines.append(
        f"routing: the busier half of a block's experts had {routing['busier_half']:.0%} of the uses "
        f"({routing['busier_half_by_chance']:.0%} by chance); {routing['stays'] or 0:.0%} of a token's "
        f"experts had been the last token's ({routing['stays_by_chance']:.0%} by chance)"
    )
    return "\n".join(lines)
