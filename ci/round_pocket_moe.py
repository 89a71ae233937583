"""Round a pocket mixture and its predictors to few bits, and measure the effect.

`python ci/round_pocket_moe.py FLOAT16 OUT` reads the folder that `m2r2kit train backbone` and `m2r2kit train
predictor` wrote. OUT is an ordinary quantised folder of mlx-lm: experts in 5 bits, embedding and attention in
8, routers and norms in float16; predictors in 8.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm import convert  # noqa: E402

from m2r2kit.bench import records  # noqa: E402
from m2r2kit.experts import train as learn  # noqa: E402
from m2r2kit.experts import trained  # noqa: E402
from m2r2kit.model.cpu import threads  # noqa: E402
from m2r2kit.pocket.export import evaluate  # noqa: E402
from m2r2kit.pocket.new_model import new_model  # noqa: E402
from m2r2kit.pocket.widen import WEIGHTS  # noqa: E402
from m2r2kit.text import download  # noqa: E402
from m2r2kit.text.corpus import documents  # noqa: E402
from m2r2kit.text.rows import for_training, text  # noqa: E402

EXPERTS, OTHERS = 5, 8  # bits
GROUP = 32  # weights that share a scale; the 160 columns are not a multiple of 64
ROWS, BATCH = 64, 8  # `text` keeps 96 held-out rows beside these


def rounded(folder: Path, out: Path) -> None:
    """Write the quantised model, and its predictors in 8 bits, bound to the new weights."""

    def bits(path, module):
        if path.endswith("mlp.gate"):
            return False
        return "switch_mlp" in path or {"group_size": GROUP, "bits": OTHERS, "mode": "affine"}

    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made"
        convert(str(folder), str(made), True, q_group_size=GROUP, q_bits=EXPERTS, quant_predicate=bits)
        weights = (made / WEIGHTS).read_bytes()
        quantization = json.loads((made / "config.json").read_text())["quantization"]
    config = json.loads((folder / "config.json").read_text()) | {"quantization": quantization}
    with new_model(out, len(weights), folder) as new:
        (new / WEIGHTS).write_bytes(weights)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (new / "generation_config.json").write_bytes((folder / "generation_config.json").read_bytes())
        trained.hand_over(folder, new, OTHERS)


def measure(folder: Path, held_out: np.ndarray) -> tuple[dict, np.ndarray]:
    """({loss, recall of each predictor by distance}, likeliest next tokens (B, T)) on token ids (B, T)."""
    backbone = for_training(folder)
    predictors = {
        kind: trained.predictor(backbone, folder, kind) for kind in (*trained.STREAMS, trained.DIRECT)
    }
    loss, tokens, recalls = [], [], {kind: [] for kind in predictors}
    for i in range(0, len(held_out), BATCH):
        rows = held_out[i : i + BATCH]
        batch = learn.teacher_batch(backbone, rows)
        logits = backbone.head(batch.states[-1])
        tokens.append(np.array(logits.argmax(-1)))
        loss.append(nn.losses.cross_entropy(logits[:, :-1], mx.array(rows[:, 1:]), reduction="mean").item())
        for kind, predictor in predictors.items():
            recalls[kind].append(learn.by_distance(learn.recall(predictor, [batch])))
    recall = {kind: {d: np.mean([f[d] for f in found]) for d in found[0]} for kind, found in recalls.items()}
    return {"loss": np.mean(loss), "recall": recall}, np.concatenate(tokens)


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpus", type=Path, help="folder of the text (default: download it)")
    parser.add_argument("--record", action="store_true", help="append the figures to data/results")
    args = parser.parse_args()
    threads.prepare()
    rounded(args.folder, args.out)
    corpus = args.corpus or download.corpus_folder()
    _, held_out = text(for_training(args.folder), corpus, ROWS, seed=0)
    (before, old), (after, new) = (measure(folder, held_out) for folder in (args.folder, args.out))
    rounding = {"tokens": new.size, "agreement": (old == new).mean(), "before": before, "after": after}
    print(json.dumps(rounding, indent=1, default=float))
    figures = evaluate(args.out, documents(corpus)) | {"rounding": rounding}
    settings = {
        "model": "pocket-moe", "model_sha256": sha256(args.out), "rounded_from": sha256(args.folder),
        "bits": {"experts": EXPERTS, "others": OTHERS}, "group": GROUP,
    }  # fmt: skip
    print(json.dumps({kind: f for kind, f in figures.items() if "loss" in f}, indent=1))
    if args.record:
        command = "python ci/round_pocket_moe.py FLOAT16 OUT --record"
        records.append("pretrain", command=command, settings=settings, figures=figures)


if __name__ == "__main__":
    main()
