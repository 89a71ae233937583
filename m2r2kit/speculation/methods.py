"""The ways of decoding by name, as the command line and the notebooks ask for them."""

import time
from pathlib import Path

import mlx.core as mx

from .. import checkpoints
from ..backbone import Backbone
from ..errors import UserError
from ..residuals import StreamConfig, load_stream
from .drafters import M2R2, EarlyExit, Plain
from .loop import Generation
from .prompt_lookup import PromptLookup

METHODS = ("plain", "mlx_lm", "early-exit", "m2r2", "prompt-lookup")
DRAFTS = 4  # where the stream does not say better


def stream_folder(model: str | Path, stream: str | Path | None) -> Path:
    """Where the trained stream of a model lies: as given, or beside its weights."""
    return Path(stream) if stream else Path(model) / "stream"


def tuned_drafts(folder: Path) -> int:
    """How many drafts a stream was tuned to (on tuning prompts), from its JSON."""
    try:
        return int(checkpoints.read_settings(folder, "stream", StreamConfig)[1].get("drafts", DRAFTS))
    except UserError:
        return DRAFTS


def drafter(method: str, backbone: Backbone, folder: Path, exit: int | None = None):
    """The drafter of a method.

    Args:
        folder: of the trained stream, for `m2r2` and for the default exit of `early-exit`.
        exit: the depth at which it drafts; by default the stream's first exit.

    Raises:
        UserError: no stream, one of another model, or an exit that it does not have.
    """
    if method == "plain":
        return Plain()
    if method == "early-exit":
        if exit is None:
            exit = checkpoints.read_settings(folder, "stream", StreamConfig)[0].exits[0]
        return EarlyExit(backbone, exit)
    if method == "m2r2":
        return M2R2(backbone, load_stream(backbone, folder), exit)
    if method == "prompt-lookup":
        return PromptLookup(backbone)
    raise UserError(f"There is no method {method}; choose {', '.join(METHODS)}.")


def mlx_lm_generate(backbone: Backbone, prompt: list[int], max_tokens: int, sampler=None) -> Generation:
    """mlx-lm's own generation of the same weights, for comparison; greedy unless given its sampler."""
    from mlx_lm.generate import generate_step

    out, begun = Generation(), time.perf_counter()
    limit = min(max_tokens, backbone.context - len(prompt))
    for token, _ in generate_step(mx.array(prompt), backbone.model, max_tokens=limit, sampler=sampler):
        out.tokens.append(int(token))
        out.drafted.append(0)
        out.accepted.append(0)
        out.from_draft.append(False)
        if out.tokens[-1] in backbone.eos:
            out.stopped = "eos"
            break
    out.seconds = time.perf_counter() - begun
    return out
