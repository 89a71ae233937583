"""Draw the held-out figures in data/README.md from the newest record of the pocket model.

`python ci/pretrain_table.py` rewrites what stands between the two marks, and nothing else.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from m2r2kit import records  # noqa: E402

README = ROOT / "data" / "README.md"
BEGIN = "<!-- held-out figures: drawn from data/results/pretrain.jsonl by ci/pretrain_table.py -->\n"
END = "<!-- end of held-out figures -->\n"


def table(record: dict | None) -> str:
    """What stands between the marks for a record; None where nothing was measured."""
    if record is None:
        return "Not measured yet.\n"
    lines = [
        "| kind | cross-entropy (nats/token) | bits/byte | next token right | tokens |",
        "|---|---|---|---|---|",
    ]
    for kind, f in record["figures"].items():
        cells = f"{f['loss']:.3f} | {f['bits_per_byte']:.3f} | {f['accuracy']:.1%} | {f['tokens']:,}"
        lines.append(f"| {kind} | {cells} |")
    s, cores = record["settings"], record["machine"]["cores"]
    lines += [
        "",
        f"{s['blocks_now']} blocks of width {s['width']}, {s['parameters'] / 1e6:.1f} M parameters, "
        f"{s['tokens_seen'] / 1e6:.1f} M tokens in {s['training_seconds'] / 3600:.1f} hours on "
        f"{cores} core{'s' * (cores != 1)} of {record['machine']['chip']}; {record['date'][:10]}.",
    ]
    return "\n".join(lines) + "\n"


def draw(text: str, record: dict | None) -> str:
    """The README's text with the table of this record."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table(record) + END + after


if __name__ == "__main__":
    README.write_text(draw(README.read_text(), records.latest("pretrain", model="pocket-dense")))
