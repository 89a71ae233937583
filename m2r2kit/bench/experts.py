"""Compare methods of streaming experts, in rounds (`rounds.py`).

All arms of a budget have the same slots; between two runs of a prompt an arm decodes all others. The time per
token is compared with

    C            computing one token, with all experts in memory if they fit (`resident.py`)
    I            reading the bytes of the LRU arm per token, at the disk's speed
    bound        (C + I) / max(C, I): the largest gain of overlap over the LRU arm
    predicted    C + I on demand, max(C + I_missed, I_all) with prefetching
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..common import UserError
from ..driver import Generation
from ..experts import registry as methods
from ..experts import trained
from ..experts.decode import ExpertDecoder, StreamedModel
from ..experts.predictors import Oracle
from ..experts.reader import Reader, system_read_bytes
from ..experts.residency import Counts
from ..experts.trace import Trace
from ..model.backbone import Backbone
from .resident import Disk, disk_speed, in_memory, streamed
from .rounds import ratios, rounds

ARMS = {  # name -> policy, predictor
    "on-demand": ("none", "nothing"),
    "lru": ("lru", "nothing"),
    "next-router": ("lru", "next-router"),
    "direct": ("lru", "direct"),
    "m2r2": ("lru", "m2r2"),
    "m2r2-r1": ("lru", "m2r2-r1"),
    "oracle": ("lru", "oracle"),
}


@dataclass
class ExpertArm:
    """One method of streaming, and its measurements in the timed rounds."""

    name: str
    decoder: ExpertDecoder
    tokens: int = 0  # per round
    times: np.ndarray | None = None  # (rounds, prompts, 2): seconds without prefill, and of the prefill
    stall_seconds: float = 0.0
    in_time: int = 0
    late: int = 0
    counts: Counts = field(default_factory=Counts)
    system_bytes: int | None = 0  # counted by the system, prefill included
    reader_bytes: int = 0  # counted by the reader, prefill included
    mismatches: int = 0
    known: list[Trace] = field(default_factory=list)  # routing of each prompt, for the oracle

    def decode(self, prompt: list[int], number: int, max_tokens: int) -> Generation:
        predictor = self.decoder.predictor
        if isinstance(predictor, Oracle):
            predictor.follow(self.known[number], self.decoder.residency.passes)
        return self.decoder.generate(prompt, max_tokens)

    @property
    def seconds(self) -> list[float]:
        """Per round, without prefill."""
        return self.times[..., 0].sum(1).tolist()

    @property
    def prefill_seconds(self) -> list[float]:
        """Prefill time per round."""
        return self.times[..., 1].sum(1).tolist()

    def timed(self, prompt: list[int], number: int, max_tokens: int) -> tuple[float, float]:
        """Decode a prompt, add its measurements, and return (seconds without prefill, prefill seconds)."""
        reader, system = self.decoder.reader, system_read_bytes()
        before = reader.bytes_read
        out = self.decode(prompt, number, max_tokens)
        self.decoder.settle()
        self.stall_seconds += out.experts.stall_seconds
        self.in_time += out.experts.in_time
        self.late += out.experts.late
        self.counts = self.counts + out.experts.counts
        self.reader_bytes += reader.bytes_read - before
        after = system_read_bytes()
        self.system_bytes = None if after is None else self.system_bytes + after - system
        return out.seconds - out.prefill_seconds, out.prefill_seconds


# --- predictors ---------------------------------------------------------------


def predictor_of(name: str, model: StreamedModel, folder, distance: int, width: int | None, trace: Trace):
    """An arm's predictor, or a sentence if it is not trained."""
    made = None
    if name in methods.TRAINED:
        try:
            made = trained.predictor(model.backbone, folder, name, width)
        except UserError as error:
            return str(error)
    return methods.predictor(name, model, distance, width, trace, made)


# --- comparison ------------------------------------------------------------------------------


def compare(
    model: StreamedModel,
    folder,
    prompts: list[list[int]],
    shares: list[float],
    disk: Disk,
    max_tokens: int = 64,
    repeats: int = 5,
    distance: int = 2,
    width: int | None = None,
    whole: Backbone | None = None,
    report: Callable | None = None,
    say: Callable = print,
) -> dict:
    """Figures of all arms at each budget, in the form of `data/results/experts.jsonl`. An arm whose texts
    differ gets no speed-up.

    Args:
        folder: the model's folder, with its trained predictors.
        shares: the budgets, as shares of all experts.
        whole: the model with its experts, if it fits in memory: the reference texts. Otherwise the reference
            is an LRU cache of the largest budget.
        report: called after each text.
        say: called with a sentence for each arm that is left out.
    """
    manifest = model.store.manifest
    if whole is not None:
        right = in_memory(model, whole, disk, prompts, max_tokens, repeats)
    else:
        right = streamed(model, round(max(shares) * manifest.experts), disk, prompts, max_tokens, repeats)
    C, speed = right.figures["compute_seconds"], disk_speed(model, disk)
    figures = {
        **right.figures,
        "disk_bytes_per_second": speed,
        "simulated": disk.link is not None,
        "resident_equal": right.equal,
        "budgets": [],
    }
    for share in shares:
        arms, readers = [], []
        slots = round(share * manifest.experts)
        try:
            for name, (policy, predictor) in ARMS.items():
                who = predictor_of(predictor, model, folder, distance, width, right.traces[0])
                if isinstance(who, str):
                    if share == shares[0]:
                        say(f"Left out: {name}. {who}")
                    continue
                readers.append(Reader(model.store, disk.mode, disk.threads, disk.link))
                make = methods.policy(policy)
                decoder = ExpertDecoder(model, model.residency(slots, make), readers[-1], who)
                arms.append(ExpertArm(name, decoder, known=right.traces))
            _run(arms, prompts, right.tokens, max_tokens, repeats, report)
        finally:
            for reader in readers:
                reader.close()
        figures["budgets"].append(_budget(arms, share, slots, C, speed, manifest.mean_record_bytes))
    return figures


def _run(arms: list[ExpertArm], prompts, right, max_tokens: int, repeats: int, report) -> None:
    """Run all arms on all prompts: once to compare the texts and fill the slots, then timed."""

    def check(arm: ExpertArm, number: int) -> None:
        out = arm.decode(prompts[number], number, max_tokens)
        arm.decoder.settle()
        arm.tokens += len(out.tokens)
        arm.mismatches += out.tokens != right[number]

    def timed(arm: ExpertArm, number: int) -> tuple[float, float]:
        return arm.timed(prompts[number], number, max_tokens)

    for arm, times in zip(arms, rounds(arms, len(prompts), repeats, timed, check, report), strict=True):
        arm.times = times


def _budget(arms: list[ExpertArm], share: float, slots: int, C: float, speed: float, record: int) -> dict:
    """Figures of one budget."""
    by_name = {arm.name: arm for arm in arms}
    lru = by_name["lru"]
    I = lru.counts.reads * record / speed / (lru.tokens * len(lru.seconds))
    found = {
        "share": share,
        "slots": slots,
        "io_over_compute": I / C,
        "bound": (C + I) / max(C, I),
        "arms": {},
    }
    for arm in arms:
        equal, all_tokens = arm.mismatches == 0, arm.tokens * len(arm.seconds)
        counts, accesses = arm.counts, max(1, arm.counts.accesses)
        I_all, I_missed = (n * record / speed / all_tokens for n in (counts.reads, counts.missed))
        found["arms"][arm.name] = {
            "tokens": arm.tokens,
            "seconds": arm.seconds,
            "prefill_seconds": arm.prefill_seconds,
            "equal": equal,
            "mismatches": arm.mismatches,
            "tokens_per_second": all_tokens / sum(arm.seconds) if equal else None,
            "speedup_vs_on_demand": ratios(by_name["on-demand"].seconds, arm.seconds) if equal else None,
            "speedup_vs_lru": ratios(lru.seconds, arm.seconds) if equal else None,
            "resident": counts.resident / accesses,
            "in_time": arm.in_time / accesses,
            "late": arm.late / accesses,
            "missed": counts.missed / accesses,
            "recall": counts.recall,
            "useful_bytes_per_token": (counts.ahead + counts.missed) * record / all_tokens,
            "bytes_per_token": counts.reads * record / all_tokens,
            "reader_bytes": arm.reader_bytes,
            "system_bytes": arm.system_bytes,
            "stall_share": arm.stall_seconds / sum(arm.seconds),
            "seconds_per_token": sum(arm.seconds) / all_tokens,
            "predicted_seconds_per_token": max(C + I_missed, I_all),
        }
    return found
