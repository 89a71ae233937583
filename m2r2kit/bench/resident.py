"""What ways of streaming are held against: right tokens, routing, a token's computing, the disk's speed.

    plain    the model itself, wholly in memory           overhead_resident = whole / plain
    whole    this wing, all experts in slots              overhead_stops    = cut / whole
    cut      the same, stopping at each block's router    C: what a token costs when nothing has to be read

All from the same texts in turn, as ratios of times. A model that does not fit the memory has none of the
three; then C is what an LRU cache's passes take without what they wait: without a predictor, reads happen
only while it waits, so that the rest is computing alone.
"""

import time
from dataclasses import dataclass

import numpy as np

from ..experts import registry as methods
from ..experts.decode import ExpertDecoder, StreamedModel
from ..experts.reader import Reader
from ..experts.trace import Trace
from ..model.backbone import Backbone
from ..speculation import generate
from .speculation import ratios

SAMPLE = 400  # records read to measure the disk


@dataclass
class Disk:
    """How records are read: as `Reader` takes it."""

    mode: str = "direct"
    threads: int = 2
    link: float | None = None


@dataclass
class Right:
    """What every arm must say, and what it took.

    Attributes:
        tokens, traces: ids and routing of each prompt.
        equal: whether they are those of the model in memory; None where that was not asked.
        figures: `compute_seconds` (C), how it was measured, and the overheads.
    """

    tokens: list[list[int]]
    traces: list[Trace]
    equal: bool | None
    figures: dict


def in_memory(
    model: StreamedModel, whole: Backbone, disk: Disk, prompts, max_tokens: int, repeats: int
) -> Right:
    """With all experts in memory; `whole` is the same model, loaded as any other.

    Its memory is that of two models.
    """
    m = model.store.manifest
    tokens, traces = [], []
    seconds = {name: [] for name in ("plain", "whole", "cut")}  # a round
    with Reader(model.store, disk.mode, disk.threads) as reader:
        decoder = ExpertDecoder(model, model.residency(m.experts, methods.policy("lru")), reader)

        def decode(name, prompt):
            if name == "plain":
                return generate(whole, prompt, max_tokens=max_tokens)
            decoder.cut = name == "cut"
            return decoder.generate(prompt, max_tokens)

        right, equal = [], True
        for prompt in prompts:  # not timed: compiles the passes, and brings the experts in
            right.append(decode("plain", prompt).tokens)
            decoder.trace = Trace(m.blocks, m.experts, m.top_k)
            tokens.append(decode("cut", prompt).tokens)
            traces.append(decoder.trace)
            decoder.trace = None
            equal = equal and right[-1] == tokens[-1] == decode("whole", prompt).tokens
        for round_ in range(repeats):
            for times in seconds.values():
                times.append(0.0)
            for number, prompt in enumerate(prompts):
                turn = (round_ + number) % 3
                for name in [*seconds, *seconds][turn : turn + 3]:
                    out = decode(name, prompt)
                    seconds[name][-1] += out.seconds - out.prefill_seconds
    count = sum(map(len, right))
    figures = {
        "compute_seconds": float(np.median(seconds["cut"])) / count,
        "compute_from": "all experts in memory, stopping at each router",
        "plain_seconds": float(np.median(seconds["plain"])) / count,
        "whole_seconds": float(np.median(seconds["whole"])) / count,
        "overhead_resident": ratios(seconds["whole"], seconds["plain"]),
        "overhead_stops": ratios(seconds["cut"], seconds["whole"]),
    }
    return Right(right, traces, equal, figures)


def streamed(model: StreamedModel, slots: int, disk: Disk, prompts, max_tokens: int, repeats: int) -> Right:
    """With so many slots a block and an LRU cache: tokens are compared among the arms alone."""
    m = model.store.manifest
    with Reader(model.store, disk.mode, disk.threads, disk.link) as reader:
        decoder = ExpertDecoder(model, model.residency(slots, methods.policy("lru")), reader)
        tokens, traces, seconds = [], [], []
        for prompt in prompts:
            decoder.trace = Trace(m.blocks, m.experts, m.top_k)
            tokens.append(decoder.generate(prompt, max_tokens).tokens)
            traces.append(decoder.trace)
        decoder.trace = None
        for _ in range(repeats):
            outs = [decoder.generate(prompt, max_tokens) for prompt in prompts]
            seconds.append(sum(out.seconds - out.prefill_seconds - out.stall_seconds for out in outs))
    figures = {
        "compute_seconds": float(np.median(seconds)) / sum(map(len, tokens)),
        "compute_from": f"an LRU cache of {slots} slots a block, without what it waited",
        "overhead_resident": None,
        "overhead_stops": None,
    }
    return Right(tokens, traces, None, figures)


def disk_speed(model: StreamedModel, disk: Disk, sample: int = SAMPLE) -> float:
    """Bytes/s of records in random order, as many at once as there are threads."""
    manifest = model.store.manifest
    all_of_them = [(l, e) for l in manifest.blocks for e in range(manifest.experts)]
    order = np.random.default_rng(0).permutation(len(all_of_them))[:sample]
    with Reader(model.store, disk.mode, disk.threads, disk.link) as reader:
        for _ in range(2):  # checksums are compared the first time
            begun = time.perf_counter()
            reader.wait([reader.submit(*all_of_them[i], lambda record: None, True) for i in order])
            seconds = time.perf_counter() - begun
    return len(order) * manifest.record_bytes / seconds
