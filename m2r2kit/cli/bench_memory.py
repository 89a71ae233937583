"""`m2r2kit bench memory`: peak memory of decoding with experts on disk, in a process of its own."""

from ..bench.memory import measure
from ..experts.store import Store
from ..model.folder import model_folder
from . import shared
from .result import check_result, keep, model_name
from .values import size


def arguments(parser):
    shared.model(parser, shared.MOE)
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
    """Measure, print and record; 1 if the texts differ or the peak exceeds `--most`."""
    check_result(args, "experts-large")
    store = Store(args.experts)  # raises before a process starts
    folder = model_folder(args.model)
    store.belongs_to(store.model_sha256(folder))
    more = ["--predictor", args.predictor, "--reads", args.reads, "--threads", str(args.threads)]
    figures = measure(str(folder), args.experts, str(args.budget), args.prompt, args.max_tokens, more)
    print(summary(figures))
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


def summary(figures: dict) -> str:
    """The figures, one line each."""
    streamed, whole, routing = figures["streamed"], figures["whole"], figures["routing"]
    lines = [
        f"{figures['model_bytes'] / 1e9:.2f} GB of weights, {figures['tokens']} tokens, "
        + ("same text:" if figures["equal"] else "DIFFERENT TEXT:")
    ]
    for name, arm in (("experts on disk", streamed), ("all in memory", whole)):
        lines.append(
            f"{name:16} peak {arm['peak_bytes'] / 1e6:7.0f} MB, {arm['tokens_per_second']:6.2f} tokens/s, "
            f"{arm['wall_seconds']:.1f} s in total"
        )
    lines.append(
        f"routing: the most used half of a block's experts takes {routing['busier_half']:.0%} of the uses "
        f"({routing['busier_half_by_chance']:.0%} by chance); {routing['stays'] or 0:.0%} of a token's "
        f"experts also ran for the token before ({routing['stays_by_chance']:.0%} by chance)"
    )
    return "\n".join(lines)
