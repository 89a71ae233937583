"""Every way to spend less depth on some tokens, by name, as the command line and notebook 03 ask for them.

A method is a kind of trained module that is read at the exits and a gate that decides from it. A token that
left early has no keys and values in the blocks it skipped: it waits, and the next token that goes deep takes
it along, which measured best (notebook 03). `-linear`, `-copy` and `-p` behind a name fill them instead
(`fill.py`). Where no token goes deeper than one before it (`static`, `skipdecode`), they are never read.
"""

from dataclasses import dataclass

from ..common import Entry, registry


@dataclass(frozen=True)
class MethodEntry(Entry):
    """A method that needs a `kind` of trained module, and leaves at its exits by a `gate` if it has exits."""

    kind: str = ""
    gate: str = ""


KINDS = registry(  # of trained modules, a folder each
    Entry("m2r2", "the accelerated residual at several exits, a linear fill, ARLA"),
    Entry("lens", "the slow residual with a layer at each exit, a linear fill, ARLA"),
    Entry("bare", "the slow residual as it is, and a linear fill"),
    Entry("mixture-of-depths", "routers that let tokens pass by blocks", source="Raposo et al. 2024"),
    Entry("shallow", "the first blocks alone, trained"),
)
CALIBRATED = ("m2r2", "lens", "bare")  # kinds with exits, whose thresholds carry a promise
DEPTHS = ("mixture-of-depths", "shallow")  # kinds that are methods as they are, without a gate
EQUAL = "-equal"  # a folder beside the kind's own: the first exit did not begin with a trained stream
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
    _method("m2r2", "m2r2", "arla", "the accelerated residual, by ARLA", "M2R2 (Bhendawade et al. 2025)"),
    _method("m2r2-blind", "m2r2", "blind", "control for the head: ARLA without its second look"),
    _method("m2r2-confidence", "m2r2", "confidence", "control for ARLA: difference of two probabilities"),
    _method("m2r2-random", "m2r2", "chance", "control for any gate: a coin"),
    _method("m2r2-oracle", "m2r2", "oracle", "bound: the answer is known beforehand"),
    _method("m2r2-static", "m2r2", "static", "control: one exit for all tokens"),
    _method(_EQUAL, _EQUAL, "arla", "m2r2 trained for as long as its baselines"),
    _method(f"{_EQUAL}-confidence", _EQUAL, "confidence", "the same, by the difference of two probabilities"),
    _method("lens-arla", "lens", "arla", "control for the stream: a trained layer at each exit, by ARLA"),
    _method("static", "lens", "static", "a trained layer, one exit for all tokens"),
    _method("calm", "lens", "confidence", "a trained layer, by the difference of two probabilities", _CALM),
    _method("saturation", "lens", "saturation", "a trained layer, by how little the state changes", _CALM),
    _method(
        "skipdecode", "lens", "schedule", "a trained layer; later tokens leave earlier",
        "SkipDecode (Del Corro et al. 2023)",
    ),
    _method(
        "layerskip", "bare", "confidence", "the bare residual, by the difference of two probabilities",
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
