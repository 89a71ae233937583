"""A routing trace: the experts that each block chose in each pass of a run, and the predictions.

It suffices to replay the bookkeeping without the model (`simulate.py`), with any policy and budget. A pass
over a prompt has many positions; the trace holds the union of their experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..common import UserError, whole
from .policies import Expert

Predicted = list[tuple[int, list[int]]]  # (block, experts), best first


@dataclass
class Pass:
    """One pass over the model.

    Attributes:
        text: index of its text.
        prompt: whether it is a pass over a prompt (without its last token).
        wanted: the chosen experts of each block with experts.
        predicted: the predictions before the first block, then those at each block.
    """

    text: int
    prompt: bool
    wanted: list[list[int]] = field(default_factory=list)
    predicted: list[Predicted] = field(default_factory=list)


@dataclass
class Trace:
    """All passes of a run of a model whose `blocks` have `experts` experts each, of which `top_k` run."""

    blocks: tuple[int, ...]
    experts: int
    top_k: int
    passes: list[Pass] = field(default_factory=list)

    @property
    def accesses(self) -> int:
        """Experts needed, summed over blocks and passes."""
        return sum(len(wanted) for p in self.passes for wanted in p.wanted)

    def uses(self) -> dict[Expert, list[int]]:
        """(block, expert) -> the numbers, from 1, of the passes that use it: `Belady`."""
        found: dict[Expert, list[int]] = {}
        for number, p in enumerate(self.passes, 1):
            for l, wanted in zip(self.blocks, p.wanted):
                for expert in wanted:
                    found.setdefault((l, expert), []).append(number)
        return found

    def tables(self) -> np.ndarray:
        """How often each expert ran in each text, (texts, blocks of the model up to the last one with
        experts, E): `TraceGuided`, `Static`."""
        texts = 1 + max((p.text for p in self.passes), default=-1)
        table = np.zeros((texts, self.blocks[-1] + 1, self.experts))
        for p in self.passes:
            for l, wanted in zip(self.blocks, p.wanted):
                table[p.text, l, wanted] += 1
        return table

    # --- files ---

    def save(self, file: str | Path) -> None:
        """Write a `.npz`, whole or not at all. Raises UserError if it cannot be written."""
        lists, names = [], []  # experts; (pass, moment, block, how many) of each prediction
        lengths = [[len(w) for w in p.wanted] for p in self.passes]
        for number, p in enumerate(self.passes):
            for moment, predicted in enumerate(p.predicted):
                for block, experts in predicted:
                    names.append((number, moment, block, len(experts)))
                    lists += experts
        with whole(file) as new, new.open("wb") as stream:
            np.savez_compressed(
                stream,
                shape=np.array([self.experts, self.top_k]),
                blocks=np.array(self.blocks),
                passes=np.array([(p.text, p.prompt) for p in self.passes], np.int32).reshape(-1, 2),
                lengths=np.array(lengths, np.int32).reshape(-1, len(self.blocks)),
                wanted=np.array([e for p in self.passes for w in p.wanted for e in w], np.int16),
                names=np.array(names, np.int32).reshape(-1, 4),
                named=np.array(lists, np.int16),
            )

    @classmethod
    def load(cls, file: str | Path, model=None) -> "Trace":
        """Read a trace.

        Args:
            model: the trace must have its `blocks`, `experts` and `top_k`; for example a manifest.

        Raises:
            UserError: there is no trace, it is damaged, or it belongs to another model.
        """
        try:
            with np.load(file, allow_pickle=False) as kept:
                arrays = {name: kept[name] for name in kept.files}
            trace = cls(tuple(arrays["blocks"].tolist()), *arrays["shape"].tolist())
            wanted, predicted = iter(arrays["wanted"].tolist()), iter(arrays["named"].tolist())
            for (text, prompt), lengths in zip(arrays["passes"].tolist(), arrays["lengths"].tolist()):
                chosen = [[next(wanted) for _ in range(n)] for n in lengths]
                trace.passes.append(Pass(text, bool(prompt), chosen, [[] for _ in range(len(chosen) + 1)]))
            if not set(arrays["wanted"].tolist()) <= set(range(trace.experts)):
                raise ValueError("there are no such experts")
            for number, moment, block, count in arrays["names"].tolist():
                trace.passes[number].predicted[moment].append(
                    (block, [next(predicted) for _ in range(count)])
                )
        except FileNotFoundError:
            raise UserError(f"There is no trace {file}; record one with `--trace`.") from None
        except Exception as error:  # NumPy raises various errors for a damaged file
            raise UserError(f"{file} is damaged or not a trace; record it again.") from error
        if model and (trace.blocks, trace.experts, trace.top_k) != (model.blocks, model.experts, model.top_k):
            raise UserError(f"{file} is the trace of another model; record one with this model.")
        return trace


def sticky(
    blocks: int, experts: int, top_k: int, passes: int, stay: float = 0.5, skew: float = 1.0, seed: int = 0
) -> Trace:
    """A synthetic trace: each expert of the last pass stays with probability `stay`, and the others are drawn
    with popularity 1 / rank ** skew, with shuffled ranks in each block."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, experts + 1) ** -float(skew)
    popularity = [rng.permutation(weights / weights.sum()) for _ in range(blocks)]
    trace, last = Trace(tuple(range(blocks)), experts, top_k), [np.array([], int)] * blocks
    for _ in range(passes):
        for l in range(blocks):
            kept = last[l][rng.random(len(last[l])) < stay]
            p = popularity[l].copy()
            p[kept] = 0
            drawn = rng.choice(experts, top_k - len(kept), replace=False, p=p / p.sum())
            last[l] = np.concatenate([kept, drawn])
        empty: list[Predicted] = [[] for _ in range(blocks + 1)]
        trace.passes.append(Pass(0, False, [w.tolist() for w in last], empty))
    return trace


def distances(trace: Trace) -> list[int]:
    """Reuse distances: for each use of an expert but its first, the number of other experts of its block that
    ran since the last one."""
    found, recent = [], {l: [] for l in trace.blocks}  # per block, newest last
    for p in trace.passes:
        for l, wanted in zip(trace.blocks, p.wanted):
            order = recent[l]
            known = {expert: len(order) - 1 - order.index(expert) for expert in wanted if expert in order}
            found += known.values()
            for expert in wanted:
                if expert in known:
                    order.remove(expert)
                order.append(expert)
    return found


def jaccard(one: Sequence[int], other: Sequence[int]) -> float:
    """Jaccard similarity of two sets of experts: |intersection| / |union|."""
    a, b = set(one), set(other)
    return len(a & b) / len(a | b) if a | b else 1.0
