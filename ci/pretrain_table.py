"""Write the held-out figures in data/README.md from the newest record of each pocket model.

`python ci/pretrain_table.py` rewrites the text between each model's marks and nothing else.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from m2r2kit.bench import records  # noqa: E402
from m2r2kit.bench.tables import Table  # noqa: E402
from m2r2kit.text.corpus import KINDS  # noqa: E402

README = ROOT / "data" / "README.md"
MODELS = ("pocket-dense", "pocket-moe")
BEGIN = "<!-- held-out figures of {}: drawn from data/results/pretrain.jsonl by ci/pretrain_table.py -->\n"
END = "<!-- end of held-out figures -->\n"


def table(record: dict | None, training: dict | None = None) -> str:
    """The text between the marks of a model.

    Args:
        record: None if nothing was measured.
        training: the record of the training, if the weights were rounded after it.
    """
    if record is None:
        return "Not measured yet.\n"
    training = training or record
    figures, s, cores = record["figures"], training["settings"], training["machine"]["cores"]
    rows = [
        (kind, f"{f['loss']:.3f}", f"{f['bits_per_byte']:.3f}", f"{f['accuracy']:.1%}", f"{f['tokens']:,}")
        for kind in KINDS
        if (f := figures.get(kind))
    ]
    heads = ("kind", "cross-entropy (nats/token)", "bits/byte", "next token right", "tokens")
    lines = [
        Table(heads, rows).as_markdown(),
        "",
        f"{s['blocks_now']} blocks of width {s['width']}, {s['parameters'] / 1e6:.1f} M parameters, "
        f"{s['tokens_seen'] / 1e6:.1f} M tokens in {s['training_seconds'] / 3600:.1f} hours on "
        f"{cores} core{'s' * (cores != 1)} of {training['machine']['chip']}; {training['date'][:10]}.",
    ]
    if "experts" in figures:
        share, entropy = figures["experts"]["share"], figures["experts"]["entropy"]
        least, most = (len(share[0]) * f(map(f, share)) for f in (min, max))
        lines.append(
            f"Of the {len(share[0])} experts of a block, {s['top']} for a token, the least used of all "
            f"blocks gets {least:.2f} times an even share of the held-out tokens, and the most {most:.2f} "
            f"times; entropy {min(entropy):.2f} to {max(entropy):.2f} bits, block by block."
        )
    if "rounding" in figures:
        lines.append(rounding(**figures["rounding"]))
    return "\n".join(lines) + "\n"


def rounding(tokens: int, agreement: float, before: dict, after: dict) -> str:
    """The effect of rounding the weights, as a sentence."""
    recalls = ", ".join(
        f"{kind} {of['1']:.2%} -> {after['recall'][kind]['1']:.2%}" for kind, of in before["recall"].items()
    )
    return (
        f"Rounded after training: {agreement:.1%} of {tokens:,} next tokens are the same as before; the "
        f"cross-entropy of that text goes {before['loss']:.4f} -> {after['loss']:.4f}, the recall of the "
        f"predictors one block ahead {recalls}."
    )


def draw(text: str, model: str, record: dict | None) -> str:
    """The README's text with the table of a model's record."""
    begin = BEGIN.format(model)
    before, rest = text.split(begin)
    _, after = rest.split(END, 1)
    origin = record and record["settings"].get("rounded_from")
    training = records.latest("pretrain", model_sha256=origin) if origin else None
    return before + begin + table(record, training) + END + after


if __name__ == "__main__":
    text = README.read_text()
    for model in MODELS:
        text = draw(text, model, records.latest("pretrain", model=model))
    README.write_text(text)
