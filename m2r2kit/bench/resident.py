"""The reference for streaming: tokens, routing, computing time per token, and disk speed.

    plain    the ordinary model in memory                    overhead_resident = whole / plain
    whole    the streamed model with all experts in slots    overhead_stops    = cut / whole
    cut      the same, stopping at each block's router       C: time per token without reads

All three decode the same texts in turn. A model that does not fit in memory has none of them; then C is the
time of an LRU cache's passes without stalls. Without a predictor, reads happen only during stalls, so the
rest is computing.
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
from .rounds import ratios, rounds

SAMPLE = 400  # records to read when measuring the disk


@dataclass
class Disk:
    """How records are read: the arguments of `Reader`."""

    mode: str = "direct"
    threads: int = 2
    link: float | None = None


@dataclass
class Right:
    """The reference texts and their cost.

    Attributes:
        tokens, traces: token ids and routing of each prompt.
        equal: whether streamed and ordinary model agree; None if only the streamed one ran.
        figures: `compute_seconds` (C), how it was measured, and the overheads.
    """

    tokens: list[list[int]]
    traces: list[Trace]
    equal: bool | None
    figures: dict


def in_memory(
    model: StreamedModel, whole: Backbone, disk: Disk, prompts, max_tokens: int, repeats: int
) -> Right:
    """The reference with all experts in memory; `whole` is the same model, loaded normally. Needs the memory
    of two models.
    """
    m = model.store.manifest
    right, tokens, traces = ([None] * len(prompts) for _ in range(3))
    same = []
    with Reader(model.store, disk.mode, disk.threads) as reader:
        decoder = ExpertDecoder(model, model.residency(m.experts, methods.policy("lru")), reader)

        def decode(name, number):
            if name == "plain":
                return generate(whole, prompts[number], max_tokens=max_tokens)
            decoder.cut = name == "cut"
            return decoder.generate(prompts[number], max_tokens)

        def check(name, number):  # also compiles the passes and loads the experts
            decoder.trace = Trace(m.blocks, m.experts, m.top_k) if name == "cut" else None
            said = decode(name, number).tokens
            if name == "plain":
                right[number] = said
            elif name == "cut":
                traces[number], decoder.trace = decoder.trace, None
            tokens[number] = tokens[number] or said
            same.append(said == tokens[number])

        def timed(name, number):
            out = decode(name, number)
            return out.seconds - out.prefill_seconds

        names = ("plain", "whole", "cut")
        times = rounds(names, len(prompts), repeats, timed, check)
        seconds = {name: each.sum(1) for name, each in zip(names, times, strict=True)}
    count = sum(map(len, right))
    figures = {
        "compute_seconds": float(np.median(seconds["cut"])) / count,
        "compute_from": "all experts in memory, stopping at each router",
        "plain_seconds": float(np.median(seconds["plain"])) / count,
        "whole_seconds": float(np.median(seconds["whole"])) / count,
        "overhead_resident": ratios(seconds["whole"], seconds["plain"]),
        "overhead_stops": ratios(seconds["cut"], seconds["whole"]),
    }
    return Right(right, traces, all(same), figures)


def streamed(model: StreamedModel, slots: int, disk: Disk, prompts, max_tokens: int, repeats: int) -> Right:
    """The reference from an LRU cache with `slots` per block, so the arms are only compared with each
    other."""
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
            seconds.append(sum(out.seconds - out.prefill_seconds - out.experts.stall_seconds for out in outs))
    figures = {
        "compute_seconds": float(np.median(seconds)) / sum(map(len, tokens)),
        "compute_from": f"an LRU cache of {slots} slots per block, without stalls",
        "overhead_resident": None,
        "overhead_stops": None,
    }
    return Right(tokens, traces, None, figures)


def disk_speed(model: StreamedModel, disk: Disk, sample: int = SAMPLE) -> float:
    """Bytes/s of reading records in random order with the reader's threads."""
    manifest = model.store.manifest
    all_of_them = [(l, e) for l in manifest.blocks for e in range(manifest.experts)]
    order = np.random.default_rng(0).permutation(len(all_of_them))[:sample]
    with Reader(model.store, disk.mode, disk.threads, disk.link) as reader:
        for _ in range(2):  # the first round also computes SHA-256
            begun = time.perf_counter()
            reader.wait([reader.submit(*all_of_them[i], lambda record: None, True) for i in order])
            seconds = time.perf_counter() - begun
    return sum(manifest.record_size(all_of_them[i][0]) for i in order) / seconds
