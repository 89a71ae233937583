"""Draw the measured figures in README.md from the newest records, and what a first command prints.

`python ci/readme_figures.py` rewrites what stands between the marks, and nothing else.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from m2r2kit.bench import claims, records  # noqa: E402
from m2r2kit.bench.tables import Table  # noqa: E402
from m2r2kit.figures import exits as figures_exits  # noqa: E402
from m2r2kit.figures import experts as figures_experts  # noqa: E402

README = ROOT / "README.md"
SEEN, SEEN_END = "<!-- seen: drawn by ci/readme_figures.py -->\n", "<!-- end of seen -->\n"
BEGIN, END = "<!-- measured: drawn by ci/readme_figures.py -->\n", "<!-- end of measured -->\n"


PAPER = "not verified"  # where no source gives the paper's value


def figures() -> str:
    """What stands between the marks: five results, each with the command that measures it."""
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
    """On what, when and by which command a record was made."""
    m = record["machine"]
    cores = f"{m['cores']} core{'s' * (m['cores'] != 1)}"
    return f"{record['command']}  # {record['date'][:10]}, {cores} of {m['chip'].replace('(R)', '')}"


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
        f"Drafting with M2R2, the same text, over plain decoding of {record['settings']['prompts']} prompts",
        f"{span(speed['m2r2'])}; {others}",
        "2.8x",
        record,
    )


def exits() -> tuple | None:
    """Leaving early: blocks that are not run."""
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
        "Blocks saved by exits where 5 % of the tokens differ after the same words; time saved",
        f"{mine['saved']:.0%} ({mine['from']:.0%} to {mine['to']:.0%}); {others}; {fastest['speedup']:.2f}x "
        f"where {fastest['agreement']:.1%} agree",
        PAPER,
        record,
    )


def experts() -> tuple | None:
    """Experts from disk: where loading ahead gains most."""
    found = [
        (budget["arms"]["m2r2"], budget, record)
        for record in figures_experts.sizes()
        for budget in record["figures"]["budgets"]
    ]
    if not found:
        return None
    arm, budget, record = max(found, key=lambda x: x[0]["speedup_vs_on_demand"]["median"])
    return (
        f"Reading experts ahead, the same text, over reading on demand ({budget['share']:.0%} in memory, "
        f"{record['settings']['record_bytes'] / 1024:.0f} KiB an expert)",
        f"{span(arm['speedup_vs_on_demand'])}; over LRU alone {arm['speedup_vs_lru']['median']:.2f}x",
        "2.9x",
        record,
    )


def large() -> tuple | None:
    """A mixture that does not fit the memory it is given."""
    record = records.latest("experts-large")
    if not record:
        return None
    f = record["figures"]
    streamed, whole = (
        f"{run['peak_bytes'] / 1e9:.2f} GB at {run['tokens_per_second']:.1f} tokens/s"
        for run in (f["streamed"], f["whole"])
    )
    return (
        f"Memory of a mixture of {f['model_bytes'] / 1e9:.1f} GB with its experts on disk, "
        f"{'the same text' if f['equal'] else 'ANOTHER TEXT'}",
        f"{streamed}; in memory {whole}",
        "-",
        record,
    )


def aligned() -> tuple | None:
    """What running ahead adds: agreement at the exit, and its controls."""
    runs = claims.accepted("alignment")
    if not runs:
        return None
    rows = {r["form"]: r for r in runs[-1]["figures"]["rows"]}
    shown = ("block", "R=1 block", "extra block", "bare")
    return (
        f"First choices at block {rows['block']['exit']} that are the model's, stream and controls",
        ", ".join(f"{name} {rows[name]['agreement']:.0%}" for name in shown if name in rows),
        PAPER,
        runs[-1],
    )


def draw(text: str) -> str:
    """The text of a README with the figures of today's records."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + figures() + END + rest.split(END)[1]


def seen(text: str) -> str:
    """The text of a README with what the first command in it prints, apart from the speed."""
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
