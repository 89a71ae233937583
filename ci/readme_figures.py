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
from m2r2kit.cli import bench_exits, bench_experts  # noqa: E402
from m2r2kit.cli.bench_speculation import table  # noqa: E402
from m2r2kit.figures import exits as figures_exits  # noqa: E402
from m2r2kit.figures import experts as figures_experts  # noqa: E402

README = ROOT / "README.md"
SEEN, SEEN_END = "<!-- seen: drawn by ci/readme_figures.py -->\n", "<!-- end of seen -->\n"
BEGIN, END = "<!-- measured: drawn by ci/readme_figures.py -->\n", "<!-- end of measured -->\n"


def made(record: dict) -> str:
    """On what, when and by which command a record was made."""
    m = record["machine"]
    cores = f"{m['cores']} core{'s' * (m['cores'] != 1)}"
    return f"{cores} of {m['chip']}, {record['date'][:10]}, `{record['command']}`"


def figures() -> str:
    """What stands between the marks."""
    lines = []
    runs = claims.accepted("speculation")
    # the run with most prompts, and that with most arms; of several the newest
    sizes = [lambda r: r["settings"].get("prompts", 0), lambda r: len(r["figures"]["arms"])]
    shown = [max(enumerate(runs), key=lambda pair: (size(pair[1]), pair[0]))[1] for size in sizes if runs]
    for i, record in enumerate(shown):
        if record in shown[:i]:
            continue
        lines += [
            f"Greedy decoding of {record['settings']['prompts']} of the kit's prompts, float32 "
            f"({made(record)}):",
            "",
            *(f"    {line}".rstrip() for line in table(record["figures"]).splitlines()),
            "",
        ]
    if shown:
        lines += [
            "`x mlx_lm` is the speed over mlx_lm's own generation, `tau` is tokens a step, `c` the cost of a "
            "draft and `v` of a verification, in plain steps.",
            "",
        ]
    if found := claims.accepted("alignment"):
        record = found[-1]
        rows = record["figures"]["rows"]
        lines += [
            f"How often the exit (block {rows[0]['exit']}) already names the model's next token, on held-out "
            f"rows; all trained alike, with as many parameters (`{record['command']}`):",
            "",
            Table(
                ("read at the exit", "parameters", "agreement"),
                [(r["form"], f"{r['parameters']:,}", f"{r['agreement']:.1%}") for r in rows],
            ).as_markdown(),
            "",
        ]
    if claims.accepted("exits"):
        record = figures_exits.newest()
        shown = bench_exits.table(record["figures"]["methods"], record["settings"]["depth"])
        lines += [
            f"Leaving early, on {record['settings']['prompts']} of the kit's prompts ({made(record)}):",
            "",
            *(f"    {line}".rstrip() for line in shown.splitlines()),
            "",
        ]
    for number, record in enumerate(figures_experts.sizes() or claims.accepted("experts")[-1:]):
        s, kind = record["settings"], "simulated" if record["figures"]["simulated"] else "real"
        lines += [
            f"Experts of {s['record_bytes'] / 1024:.0f} KiB read from a {kind} disk ({s['model']}, "
            f"{s['prompts']} of the kit's prompts; {made(record)}):",
            "",
            *(f"    {line}".rstrip() for line in experts_table(record["figures"], whole=number == 0)),
            "",
        ]
    if record := records.latest("experts-large"):
        f = record["figures"]
        same = "the same tokens as" if f["equal"] else "OTHER TOKENS THAN"
        lines += [
            f"A model of {f['model_bytes'] / 1e9:.2f} GB, of random weights, in a process whose peak the "
            f"system gives as {f['streamed']['peak_bytes'] / 1e9:.2f} GB (the whole model in memory: "
            f"{f['whole']['peak_bytes'] / 1e9:.2f} GB): {same} without a budget, "
            f"{f['streamed']['tokens_per_second']:.1f} and {f['whole']['tokens_per_second']:.1f} tokens/s "
            f"({made(record)}).",
            "",
        ]
    return "\n".join(lines) if lines else "Not measured yet.\n"


def experts_table(found: dict, whole: bool) -> list[str]:
    """All arms at all budgets; or only M2R2, a line a budget."""
    if whole:
        return bench_experts.table(found).splitlines()
    lines = []
    for budget in found["budgets"]:
        arm = budget["arms"]["m2r2"]
        demand, lru = (arm[f"speedup_vs_{name}"]["median"] for name in ("on_demand", "lru"))
        lines.append(
            f"budget {budget['share']:.1%}: M2R2 {arm['tokens_per_second']:.1f} tok/s, {demand:.2f}x on "
            f"demand, {lru:.2f}x LRU (I/C {budget['io_over_compute']:.2f}, bound {budget['bound']:.2f}x)"
        )
    return lines


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
