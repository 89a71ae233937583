"""Tables of records, for the bench commands and notebook 14.

measured.speculation(figures)               tables of a record's figures; likewise `exits`, `experts`, ..
measured.Measured("speculation", record)    the same with title, command and machine, folded in a notebook
"""

import html

from .exits import speedup_at
from .merit import LOSSES
from .tables import Table

DRAFTING = (
    "method", "speed-up", "from..to", "x mlx_lm", "predicted", "tau", "c", "v", "equal", "acceptance"
)  # fmt: skip
LEAVING = ("method", "saved at 1 %", "saved at 5 %", "less than m2r2", "speed-up", "answers")
READING = (
    "arm", "tok/s", "x demand", "x lru", "resident", "in time", "late", "missed", "recall", "MB/token",
    "predicted",
)  # fmt: skip


class Measured:
    """Title and tables of a record, with its command, date and machine.

    Args:
        subject: one of `SUBJECTS`.
        record: one of `records.read(subject)`.
    """

    def __init__(self, subject: str, record: dict):
        title, tables = SUBJECTS[subject]
        self.record, self.tables = record, tables(record["figures"])
        self.title = title(record["settings"], record["figures"])

    def __repr__(self) -> str:
        return "\n\n".join(
            [f"{self.title} ({made(self.record)}: {self.record['command']})", *map(str, self.tables)]
        )

    def _repr_html_(self) -> str:
        parts = self.title, made(self.record), self.record["command"]
        title, where, command = map(html.escape, parts)
        tables = "".join(table._repr_html_() for table in self.tables)
        return (
            f"<details><summary><b>{title}</b></summary>{tables}"
            f"<p>{where}; again: <code>{command}</code></p></details>"
        )


def made(record: dict) -> str:
    """Date and machine of a record."""
    machine = record["machine"]
    cores = f"{machine['cores']} core{'s' * (machine['cores'] != 1)}"
    return f"{record['date'][:10]}, {cores} of {machine['chip'].replace('(R)', '')}"


# --- tables of figures --------------------------------------------------------------------------


def speculation(figures: dict) -> list[Table]:
    """The arms, and their speed-ups per kind of prompt; an arm whose text differs has no speed-up."""
    rows = []
    for name, arm in figures["arms"].items():
        speed, over, predicted = (
            arm.get(key) for key in ("speedup_vs_plain", "speedup_vs_mlx_lm", "predicted_speedup")
        )
        equal = "yes" if arm["mismatches"] == 0 else f"yes ({arm['ties']} ties)" if arm["equal"] else "NO"
        rows.append((
            name,
            _times(speed),
            f"{speed['min']:.2f}..{speed['max']:.2f}" if speed else "-",
            _times(over),
            f"{predicted:.2f}x" if predicted else "-",
            *(f"{arm[key]:.2f}" for key in ("tau", "draft_cost", "verify_cost")),
            equal,
            " ".join(f"{a:.2f}" for a in arm["acceptance"]),
        ))  # fmt: skip
    tables = [Table(DRAFTING, rows, left=DRAFTING[-2:])]
    kinds = {kind: arms for kind, arms in figures["per_kind"].items() if kind}
    if kinds:
        rows = [
            (name, *(_times(arms.get(name)) for arms in kinds.values()))
            for name in figures["arms"]
            if name != "plain"
        ]
        tables.append(Table(("speed-up on", *kinds), rows))
    return tables


def readouts(figures: dict) -> list[Table]:
    """Agreement of each readout of `m2r2kit train stream --compare` with the model's own token."""
    rows = [(row["form"], f"{row['parameters']:,}", f"{row['agreement']:.1%}") for row in figures["rows"]]
    return [Table(("readout at the exit", "trained parameters", "agreement"), rows)]


def exits(figures: dict) -> list[Table]:
    """The methods, sorted by blocks saved at 5 % loss of agreement."""
    methods, rows = figures["methods"], []
    for name in sorted(methods, key=lambda name: -methods[name]["merit"][str(LOSSES[-1])]["saved"]):
        one, five = (methods[name]["merit"][str(loss)] for loss in LOSSES)
        timed, kept = methods[name].get("timed"), methods[name].get("answers")
        rows.append((
            name,
            *(f"{m['saved']:.1%} ({m['from']:.1%}..{m['to']:.1%})" for m in (one, five)),
            f"{100 * five['lead']:.1f} ({100 * five['lead_from']:.1f}..{100 * five['lead_to']:.1f})",
            f"{speedup_at(timed, LOSSES[-1]):.2f}x" if timed else "-",
            f"{kept['same']} of {kept['asked']}" if kept else "-",
        ))  # fmt: skip
    what = "Share of the blocks saved, at 1 % and 5 % loss of agreement; speed-up at 5 %."
    return [Table(LEAVING, rows, what)]


def experts(figures: dict) -> list[Table]:
    """The conditions, and the arms at each budget; an arm whose text differs has no speed-up."""
    tables = [Table(("", " "), _conditions(figures), left=(" ",))]
    for budget in figures["budgets"]:
        rows = [(name, *_reading(arm)) for name, arm in budget["arms"].items()]
        caption = (
            f"budget {budget['share']:.1%} ({budget['slots']} slots per block), "
            f"reading / computing time (I/C) {budget['io_over_compute']:.2f}, "
            f"bound over LRU {budget['bound']:.2f}x"
        )
        tables.append(Table(READING, rows, caption))
    return tables


def _conditions(figures: dict) -> list[tuple[str, str]]:
    whole = "not measured: the arms' texts are compared with each other"
    if figures["resident_equal"] is not None:
        overhead, stops = (figures[f"overhead_{name}"]["median"] for name in ("resident", "stops"))
        whole = f"{overhead:.3f} times plain decoding; with a stop at each router {stops:.3f} times that"
        whole += "" if figures["resident_equal"] else "; THE TEXTS DIFFER"
    return [
        ("computing a token", f"{1000 * figures['compute_seconds']:.2f} ms ({figures['compute_from']})"),
        (
            "disk (simulated)" if figures["simulated"] else "disk",
            f"{figures['disk_bytes_per_second'] / 1e6:.0f} MB/s",
        ),
        ("all experts in memory", whole),
    ]


def memory(figures: dict) -> list[Table]:
    """The two processes of `m2r2kit bench memory`."""
    rows = [
        (
            name,
            f"{arm['peak_bytes'] / 1e6:.0f} MB",
            f"{arm['tokens_per_second']:.2f}",
            f"{arm['wall_seconds']:.1f} s",
        )
        for name, arm in (("experts on disk", figures["streamed"]), ("all in memory", figures["whole"]))
    ]
    return [Table(("", "peak of the process", "tokens/s", "from start to end"), rows)]


def _times(speed: dict | None) -> str:
    return f"{speed['median']:.2f}x" if speed else "-"


def _reading(arm: dict) -> tuple[str, ...]:
    speed = ("differs", "-", "-")
    if arm["equal"]:
        over = (_times(arm[f"speedup_vs_{name}"]) for name in ("on_demand", "lru"))
        speed = (f"{arm['tokens_per_second']:.1f}", *over)
    shares = (f"{arm[key]:.1%}" for key in ("resident", "in_time", "late", "missed"))
    recall = "-" if arm["recall"] is None else f"{arm['recall']:.1%}"
    predicted = f"{1 / arm['predicted_seconds_per_token']:.1f}"
    return (*speed, *shares, recall, f"{arm['bytes_per_token'] / 1e6:.2f}", predicted)


SUBJECTS = {  # subject -> (settings, figures) -> title; figures -> tables
    "speculation": (
        lambda s, f: f"Greedy decoding of {s['prompts']} prompts, {len(f['arms'])} methods",
        speculation,
    ),
    "alignment": (
        lambda s, f: f"Agreement with the model's token at block {f['rows'][0]['exit']}, equal training",
        readouts,
    ),
    "exits": (lambda s, f: f"Early exits, {s['prompts']} prompts, {len(f['methods'])} methods", exits),
    "experts": (
        lambda s, f: (
            f"Experts of {s['record_bytes'] / 1024:.0f} KiB read from a "
            f"{'simulated' if f['simulated'] else 'real'} disk, {s['prompts']} prompts"
        ),
        experts,
    ),
    "experts-large": (
        lambda s, f: (
            f"A model of {f['model_bytes'] / 1e9:.1f} GB with its experts on disk, "
            f"{'the same' if f['equal'] else 'ANOTHER'} text"
        ),
        memory,
    ),
}
