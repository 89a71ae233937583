"""All early-exit methods by name, for the command line and notebook 03.

A method is a kind of trained module, read at the exits, and a gate. A token that left early has no keys and
values in the blocks it skipped. By default it is deferred, and the next token that goes deep takes it along,
which measured best (notebook 03). The suffixes `-linear`, `-copy` and `-p` fill the skipped blocks instead
(`fill.py`). If no token goes deeper than an earlier one (`static`, `skipdecode`), the skipped blocks are
never read.
"""

from dataclasses import dataclass

from ..common import Entry, registry


@dataclass(frozen=True)
class MethodEntry(Entry):
    """A method: the `kind` of trained module it needs, and its `gate`, empty if it has no exits."""

    kind: str = ""
    gate: str = ""


KINDS = registry(  # kinds of trained modules, each in its own folder
    Entry("m2r2", "the accelerated residual at several exits, a linear fill, ARLA"),
    Entry("lens", "the slow residual with a layer at each exit, a linear fill, ARLA"),
    Entry("bare", "the unchanged slow residual, and a linear fill"),
    Entry("mixture-of-depths", "routers that let tokens skip blocks", source="Raposo et al. 2024"),
    Entry("shallow", "the first blocks alone, trained"),
)
CALIBRATED = ("m2r2", "lens", "bare")  # kinds with exits, whose thresholds can be calibrated
DEPTHS = ("mixture-of-depths", "shallow")  # kinds that are methods by themselves, without a gate
EQUAL = "-equal"  # suffix of a kind's folder: trained without starting from a trained stream
FILLS = {
    "linear": "a linear map of the state fills skipped blocks",
    "copy": "the state at the exit fills skipped blocks",
    "p": "the accelerated state fills skipped blocks",
}


def split(name: str) -> tuple[str, str]:
    """The method and its fill: `calm-copy` -> (`calm`, `copy`), `calm` -> (`calm`, `wait`)."""
    for fill in FILLS:
        if name.endswith(f"-{fill}"):
            return name.removesuffix(f"-{fill}"), fill
    return name, "wait"


def _method(name: str, kind: str, gate: str, about: str, source: str = "") -> MethodEntry:
    return MethodEntry(name, about, "train exits", source, kind, gate)


_CALM, _EQUAL = "CALM (Schuster et al. 2022)", f"m2r2{EQUAL}"
_OWN = registry(
    _method("m2r2", "m2r2", "arla", "the accelerated residual, with ARLA", "M2R2 (Bhendawade et al. 2025)"),
    _method("m2r2-blind", "m2r2", "blind", "control for the head: ARLA without its second score"),
    _method("m2r2-confidence", "m2r2", "confidence", "control for ARLA: difference of two probabilities"),
    _method("m2r2-random", "m2r2", "chance", "control for any gate: a random score"),
    _method("m2r2-oracle", "m2r2", "oracle", "upper bound: the answer is known"),
    _method("m2r2-static", "m2r2", "static", "control: one exit for all tokens"),
    _method(_EQUAL, _EQUAL, "arla", "m2r2 trained for as long as its baselines"),
    _method(f"{_EQUAL}-confidence", _EQUAL, "confidence", "the same, difference of two probabilities"),
    _method("lens-arla", "lens", "arla", "control for the stream: a trained layer at each exit, with ARLA"),
    _method("static", "lens", "static", "a trained layer, one exit for all tokens"),
    _method("calm", "lens", "confidence", "a trained layer, with the difference of two probabilities", _CALM),
    _method("saturation", "lens", "saturation", "a trained layer, with the change of the state", _CALM),
    _method(
        "skipdecode", "lens", "schedule", "a trained layer; later tokens leave earlier",
        "SkipDecode (Del Corro et al. 2023)",
    ),
    _method(
        "layerskip", "bare", "confidence", "the bare residual, with the difference of two probabilities",
        "LayerSkip (Elhoushi et al. 2024)",
    ),
)  # fmt: skip


def _filled(name: str) -> MethodEntry:
    base, fill = split(name)
    return _method(name, _OWN[base].kind, _OWN[base].gate, f"{base}; {FILLS[fill]}")


METHODS = _OWN | registry(
    *map(_filled, ("m2r2-linear", "m2r2-copy", "m2r2-p", "calm-linear", "calm-copy")),
    *(_method(name, name, "", KINDS[name].about, KINDS[name].source) for name in DEPTHS),
)
