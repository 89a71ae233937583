"""Peak memory of a model with experts on disk: the same text in two fresh processes.

    streamed    `generate --experts STORE --budget B`     the measured peak
    whole       `generate --method plain`                 the reference tokens

Each process is the ordinary command. It reports its own peak memory as counted by the system, from its start
to the last token, libraries included.
"""

import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..common import UserError


def generate(words: list[str]) -> dict:
    """The output of `generate --json` in a fresh process, with its `wall_seconds`.

    Args:
        words: further arguments.

    Raises:
        UserError: the process failed, with its last line.
    """
    begun = time.perf_counter()
    asked = [sys.executable, "-m", "m2r2kit", "generate", "--json", *words]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UserError(
            said[-1].removeprefix("m2r2kit: ")
            if said
            else f"`m2r2kit generate` ended with status {done.returncode}."
        )
    return json.loads(done.stdout) | {"wall_seconds": time.perf_counter() - begun}


def measure(model: str, store: Path, budget: str, prompt: str, max_tokens: int, more: list[str]) -> dict:
    """Figures of both runs, in the form of `data/results/experts-large.jsonl`.

    Args:
        budget: memory for experts, as for `generate --budget`.
        more: further arguments of the streamed run.
    """
    asked = ["--model", model, "--raw", "--prompt", prompt, "--max-tokens", str(max_tokens)]
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.npz"
        words = [*asked, "--experts", str(store), "--budget", budget, "--trace", str(trace), *more]
        streamed = generate(words)
        skew = skewness(trace)
    whole = generate([*asked, "--method", "plain"])
    return {
        "model_bytes": sum(file.stat().st_size for file in Path(model).glob("model*.safetensors")),
        "store_bytes": sum(file.stat().st_size for file in store.glob("block-*.bin")),
        "tokens": len(streamed["tokens"]),
        "equal": streamed["tokens"] == whole["tokens"],
        "routing": skew,
        "streamed": _figures(streamed) | {
            name: streamed[name]
            for name in ("resident", "in_time", "late", "missed", "bytes_asked_for", "stall_seconds")
        },
        "whole": _figures(whole),
    }  # fmt: skip


def _figures(out: dict) -> dict:
    text = out["seconds"] - out["prefill_seconds"]
    return {
        "peak_bytes": out["peak_bytes"],
        "tokens_per_second": len(out["tokens"]) / text,
        "prefill_seconds": out["prefill_seconds"],
        "wall_seconds": out["wall_seconds"],
    }


def skewness(file: Path) -> dict:
    """How unevenly a run used the experts, means over blocks: `busier_half`, the share of uses of the more
    used half; `stays`, the share of a token's experts that also ran for the previous token; `.._by_chance`,
    the same with random routing in a text of this length."""
    from ..experts.trace import Trace

    trace = Trace.load(file)
    passes = [p.wanted for p in trace.passes if not p.prompt]
    halves, stays = [], []

    def busier_half(chosen) -> float:
        uses = np.bincount(np.ravel(chosen), minlength=trace.experts)
        return np.sort(uses)[trace.experts // 2 :].sum() / uses.sum()

    for i in range(len(trace.blocks)):
        halves.append(busier_half([wanted[i] for wanted in passes]))
        stays += [len(set(a[i]) & set(b[i])) / trace.top_k for a, b in pairwise(passes)]
    lots = np.random.default_rng(0).random((20, len(passes), trace.experts)).argsort(-1)[..., : trace.top_k]
    return {
        "busier_half": float(np.mean(halves)),
        "busier_half_by_chance": float(np.mean([busier_half(lot) for lot in lots])),
        "stays": float(np.mean(stays)) if stays else None,
        "stays_by_chance": trace.top_k / trace.experts,
    }
