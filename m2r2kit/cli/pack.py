"""`m2r2kit pack`: write a model's experts as a store that is read one expert at a time."""

import sys
from pathlib import Path

from tqdm import tqdm

from ..experts.packing import pack
from ..experts.store import Store
from ..model.folder import model_folder
from ..model.hashes import weights_sha256


def arguments(parser):
    parser.add_argument("model", metavar="MODEL", help="mixture of experts that mlx_lm loads")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the store")
    parser.add_argument(
        "--verify", action="store_true", help="read an existing store and compare all checksums"
    )


def run(args) -> int:
    """Pack, or with `--verify` check an existing store; 1 if a record is damaged."""
    return verify(args) if args.verify else write(args)


def write(args) -> int:
    with _bar() as bar:

        def report(done: int, total: int):
            bar.total = total
            bar.update(done)

        manifest = pack(args.model, args.out, report)
    kib = sorted({manifest.record_size(block) // 1024 for block in manifest.blocks})
    sizes = f"{kib[0]}" if len(kib) == 1 else f"{kib[0]} to {kib[-1]}"
    print(
        f"Packed {len(manifest.blocks)} blocks of {manifest.experts} experts into {args.out}: "
        f"{manifest.total_bytes / 1e9:.3f} GB in records of {sizes} KiB."
    )
    return 0


def verify(args) -> int:
    store = Store(args.out)
    store.belongs_to(weights_sha256(model_folder(args.model)))
    with _bar() as bar:
        bar.total = store.manifest.total_bytes
        damaged = store.damaged(bar.update)
    if damaged:
        block, expert = damaged[0]
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        print(f"Expert {expert} of block {block}{more} in {args.out} is damaged; pack the model again.")
        return 1
    print(f"All {len(store.manifest.blocks) * store.manifest.experts} experts in {args.out} are intact.")
    return 0


def _bar() -> tqdm:
    return tqdm(unit="B", unit_scale=True, desc="experts", leave=False, disable=not sys.stderr.isatty())
