"""Write the measured figures of README.md from the newest records, and the output of its first command.

`python ci/readme_figures.py` rewrites the text between the marks and nothing else.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from m2r2kit.bench import claims, measured, records  # noqa: E402
from m2r2kit.bench.tables import Table  # noqa: E402
from m2r2kit.figures import exits as figures_exits  # noqa: E402
from m2r2kit.figures import experts as figures_experts  # noqa: E402

README = ROOT / "README.md"
SEEN, SEEN_END = "<!-- seen: drawn by ci/readme_figures.py -->\n", "<!-- end of seen -->\n"
BEGIN, END = "<!-- measured: drawn by ci/readme_figures.py -->\n", "<!-- end of measured -->\n"


PAPER = "not verified"  # where no source gives the paper's value


def figures() -> str:
    """The text between the marks: five results, each with the command that measures it."""
    rows = [row for row in (drafts(), exits(), experts(), large(), aligned()) if row]
    if not rows:
        return "Not measured yet.\n"
    table = Table(
        ("", "result", "measured", "paper"),
        [(str(n), *row[:-1]) for n, row in enumerate(rows, 1)],
        left=("result", "measured", "paper"),
    )
    how = [f"    {n}  {made(row[-1])}" for n, row in enumerate(rows, 1)]
    return "\n".join([table.as_markdown(), "", *how]) + "\n"


def made(record: dict) -> str:
    """By which command, when and on what a record was made."""
    return f"{record['command']}  # {measured.made(record)}"


def span(x: dict) -> str:
    """A speed-up with its smallest and largest value over the rounds."""
    return f"{x['median']:.2f}x ({x['min']:.2f} to {x['max']:.2f})"


def drafts() -> tuple | None:
    """Self-speculation, from the run with most prompts."""
    runs = [r for r in claims.accepted("speculation") if "m2r2" in r["figures"]["arms"]]
    if not runs:
        return None
    record = max(runs, key=lambda r: (r["settings"].get("prompts", 0), r["date"]))
    speed = {n: a["speedup_vs_plain"] for n, a in record["figures"]["arms"].items() if a["speedup_vs_plain"]}
    others = ", ".join(f"{n} {x['median']:.2f}x" for n, x in speed.items() if n not in ("plain", "m2r2"))
    return (
        f"Speed-up of M2R2 drafting over plain decoding, same text, {record['settings']['prompts']} prompts",
        f"{span(speed['m2r2'])}; {others}",
        "2.8x",
        record,
    )


def exits() -> tuple | None:
    """Early exits: blocks that are not run."""
    if not claims.accepted("exits"):
        return None
    record = figures_exits.newest()
    methods = record["figures"]["methods"]
    saved = {name: m["merit"]["0.05"] for name, m in methods.items()}
    mine, fastest = saved["m2r2"], methods["m2r2"]["fastest"]
    others = ", ".join(
        f"{name} {saved[name]['saved']:.0%}" for name in ("m2r2-oracle", "calm") if name in saved
    )
    return (
        "Blocks skipped by early exits at 5 % disagreement with the model; speed-up",
        f"{mine['saved']:.0%} ({mine['from']:.0%} to {mine['to']:.0%}); {others}; {fastest['speedup']:.2f}x "
        f"at {fastest['agreement']:.1%} agreement",
        PAPER,
        record,
    )


def experts() -> tuple | None:
    """Experts on disk: the budget at which prefetching gains most."""
    found = [
        (budget["arms"]["m2r2"], budget, record)
        for record in figures_experts.sizes()
        for budget in record["figures"]["budgets"]
    ]
    if not found:
        return None
    arm, budget, record = max(found, key=lambda x: x[0]["speedup_vs_on_demand"]["median"])
    return (
        f"Speed-up of prefetching over reading experts on demand, same text ("
        f"{budget['share']:.0%} in memory, {record['settings']['record_bytes'] / 1024:.0f} KiB per expert)",
        f"{span(arm['speedup_vs_on_demand'])}; over an LRU cache {arm['speedup_vs_lru']['median']:.2f}x",
        "2.9x",
        record,
    )


def large() -> tuple | None:
    """A mixture larger than its memory budget."""
    record = records.latest("experts-large", model="large")
    if not record:
        return None
    f = record["figures"]
    streamed, whole = (
        f"{run['peak_bytes'] / 1e9:.2f} GB at {run['tokens_per_second']:.1f} tokens/s"
        for run in (f["streamed"], f["whole"])
    )
    return (
        f"Peak memory of a {f['model_bytes'] / 1e9:.1f} GB mixture with its experts on disk, "
        f"{'same text' if f['equal'] else 'DIFFERENT TEXT'}",
        f"{streamed}; all in memory: {whole}",
        "-",
        record,
    )


def aligned() -> tuple | None:
    """Agreement with the model at the exit: the stream and its controls."""
    runs = claims.accepted("alignment")
    if not runs:
        return None
    rows = {r["form"]: r for r in runs[-1]["figures"]["rows"]}
    shown = {
        "block": "stream",
        "R=1 block": "at rate 1",
        "extra block": "one extra block",
        "bare": "logit lens",
    }
    return (
        f"Agreement with the model's next token after block {rows['block']['exit']}: stream and controls",
        ", ".join(f"{label} {rows[name]['agreement']:.0%}" for name, label in shown.items() if name in rows),
        PAPER,
        runs[-1],
    )


def draw(text: str) -> str:
    """A README's text with the figures of the newest records."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + figures() + END + rest.split(END)[1]


def seen(text: str) -> str:
    """A README's text with the output of its first command, without the speed."""
    before, rest = text.split(SEEN)
    command = shlex.split(next(line for line in before.splitlines() if "m2r2kit generate --prompt" in line))
    run = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    last = re.sub(r", \d+ tokens/s", "", run.stderr.strip().splitlines()[-1])
    lines = [*run.stdout.rstrip().splitlines(), last]
    return (
        before
        + SEEN
        + "\n".join(f"    {line}".rstrip() for line in lines)
        + "\n"
        + SEEN_END
        + rest.split(SEEN_END)[1]
    )


if __name__ == "__main__":
    README.write_text(seen(draw(README.read_text(encoding="utf-8"))), encoding="utf-8")
