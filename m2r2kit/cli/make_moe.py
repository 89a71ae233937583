"""`m2r2kit make-moe`: write a mixture of experts for benchmarks, with random weights or by widening a trained
one."""

import sys
from pathlib import Path

from tqdm import tqdm

from ..common import UserError, check_writable, missing_advice
from ..experts import trained
from ..pocket import widen as wider_moe
from ..pocket.random_olmoe import LargeConfig, sized, write
from . import shared
from .shared import MODEL, MOE
from .values import number, size

SIZE, WIDTH = 4_500_000_000, 512  # defaults: bytes, and width of an expert


def arguments(parser):
    parser.add_argument("out", type=Path, metavar="DIR", help="folder to write the model to")
    parser.add_argument(
        "--size", type=size, metavar="SIZE", help="minimum size of the weights (default: 4.5GB)"
    )
    parser.add_argument(
        "--widen",
        type=number(int, 2),
        metavar="K",
        help="widen the experts of a trained model K times instead, with the same output",
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="model to widen with --widen (default: data/pocket-moe)"
    )
    parser.add_argument(
        "--width",
        type=number(int, 8),
        metavar="D",
        help="width of the residual stream and of the experts, a multiple of 8; an expert takes 12 D^2 bytes "
        "(default: 512)",
    )
    shared.seed(parser)


def run(args) -> int:
    if not args.out.exists():  # otherwise it is refused below
        check_writable(args.out)
    if not args.model and not (needed := MOE if args.widen else MODEL).exists():
        raise UserError(
            f"There is no model folder {needed}; {missing_advice(needed, 'restore it from git')}."
        )
    if args.widen:
        if args.size or args.width:
            raise UserError("--widen keeps the other sizes of the model; leave out --size and --width.")
        model = args.model or MOE
        nbytes = wider_moe.write(model, args.out, args.widen, lambda out: trained.hand_over(model, out))
        print(
            f"{args.out}: {model} with experts {args.widen} times as wide, {nbytes / 2**20:.2f} MiB\n"
            "each in float32. It generates the same text, routes to the same experts,\n"
            "and has the same predictors."
        )
        return 0
    if args.model:
        raise UserError("--model names the model to widen; add --widen K, or leave it out.")
    config = sized(args.size or SIZE, width=args.width or WIDTH, seed=args.seed)
    bar = tqdm(total=config.total_bytes, unit="B", unit_scale=True, desc="weights", leave=False,
               disable=not sys.stderr.isatty())  # fmt: skip
    with bar:
        write(config, args.out, MODEL, bar.update)
    print(description(config, args.out))
    return 0


def description(config: LargeConfig, out) -> str:
    """What was written, in two lines."""
    return (
        f"{out}: {config.total_bytes / 1e9:.2f} GB in float32, {config.blocks} blocks of {config.experts} "
        f"experts of {config.expert_bytes / 2**20:.2f} MiB, {config.top} per token.\n"
        "All weights are random, and so is its text. Its routers favour some experts, as those of a trained "
        f"model do: the logit of the expert of rank r is raised by {config.skew} ln(1/r)."
    )
