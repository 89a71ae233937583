"""`m2r2kit make-moe`: a mixture of experts of random weights, as large as asked."""

import sys

from tqdm import tqdm

from ..arguments import MODEL
from ..large_olmoe import LargeConfig, sized, write


def run(args) -> int:
    config = sized(args.size, width=args.width, seed=args.seed)
    bar = tqdm(total=config.total_bytes, unit="B", unit_scale=True, desc="weights", leave=False,
               disable=not sys.stderr.isatty())  # fmt: skip
    with bar:
        write(config, args.out, MODEL, bar.update)
    print(in_words(config, args.out))
    return 0


def in_words(config: LargeConfig, out) -> str:
    """What it is, and what it is not."""
    return (
        f"{out}: {config.total_bytes / 1e9:.2f} GB in float32, {config.blocks} blocks of {config.experts} "
        f"experts of {config.expert_bytes / 2**20:.2f} MiB, of which a token takes {config.top}.\n"
        "All weights are random, and so is its text. Its routers prefer some experts to others by rule, as a "
        f"trained model's do: expert number r by rank is favoured by {config.skew} ln(1/r) in its logit."
    )
