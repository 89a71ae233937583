"""The decoding methods by name, for the command line, the benches and the notebooks.

Importing this file reads only names and descriptions; a method's code is imported when it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..common import Entry, UserError, registry
from ..model.folder import trained_folder

if TYPE_CHECKING:
    from ..model.backbone import Backbone
    from ..stream.trained import TrainedStream
    from .drafters.base import Drafter

METHODS = registry(
    Entry("plain", "the model alone, one token a pass"),
    Entry("mlx_lm", "the model alone, with mlx-lm's own loop"),
    Entry("early-exit", "first blocks, bare residual", source="as in LayerSkip (Elhoushi et al. 2024)"),
    Entry(
        "m2r2",
        "first blocks, accelerated residual",
        "train stream",
        "M2R2 (Bhendawade et al. 2025), as we read it",
    ),
    Entry("m2r2-tree", "the same as m2r2, but a tree of its likeliest tokens", "train stream"),
    Entry("prompt-lookup", "repeats what followed the same words before", source="Saxena 2023"),
    Entry("lookahead", "guesses a window of tokens and keeps n-grams", source="LookAhead (Fu et al. 2024)"),
    Entry(
        "draft-model",
        "a separate small model",
        "train drafter",
        "Leviathan et al. 2023; Chen et al. 2023",
    ),
    Entry(
        "eagle",
        "a block that continues the last states",
        "train drafter",
        "as in EAGLE (Li et al. 2024)",
    ),
    Entry("medusa", "a head for each position ahead", "train drafter", "as in Medusa (Cai et al. 2024)"),
    Entry("kangaroo", "first blocks and a trained one", "train drafter", "as in Kangaroo (Liu et al. 2024)"),
    Entry(
        "deed",
        "first blocks and adapters, the exit by confidence",
        "train drafter",
        "as in DEED (Tang et al. 2024)",
    ),
)
TRAINED = tuple(name for name, entry in METHODS.items() if entry.needs == "train drafter")
DRAFTS = 4  # default draft length of an untuned stream


def stream_folder(model: str | Path, stream: str | Path | None) -> Path:
    """The folder of a model's trained stream: `stream` if given, else the one beside the weights."""
    return Path(stream) if stream else trained_folder(model, "stream")


def drafters_folder(model: str | Path, drafters: str | Path | None) -> Path:
    """The folder of a model's trained baselines, one folder each: `drafters` if given, else the one
    beside the weights.
    """
    return Path(drafters) if drafters else trained_folder(model, "drafters")


def ready(
    method: str,
    backbone: Backbone,
    stream: Path | TrainedStream | None = None,
    drafters: Path | None = None,
    exit: int | None = None,
    drafts: int | None = None,
) -> tuple[Drafter, int]:
    """The drafter of a method, and the number of tokens it drafts in a step.

    Args:
        stream: the trained stream or its folder, for `m2r2` and `m2r2-tree`; for untrained methods it gives
            the default draft length and exit.
        drafters: folder of the trained baselines, one folder each.
        exit: the depth at which `m2r2`, `m2r2-tree` and `early-exit` draft; by default the stream's first
            exit.
        drafts: draft exactly this many tokens; by default the tuned number and threshold.

    Raises:
        UserError: the module is not trained, belongs to another model, or lacks this exit.
    """
    from ..stream.trained import TrainedStream
    from . import trained as baselines
    from .drafters import base
    from .drafters.lookahead import Lookahead
    from .drafters.m2r2_tree import LEAVES, M2R2Tree
    from .drafters.prompt_lookup import PromptLookup

    if method not in METHODS or method == "mlx_lm":
        raise UserError(f"There is no method {method} that drafts; choose {', '.join(METHODS)}.")
    if method == "plain":
        return base.Plain(), 0
    if method in TRAINED:
        if drafters is None:
            raise UserError(f"The method {method} needs the folder of the trained drafters.")
        module, facts = baselines.load(backbone, method, drafters / method)
        found = baselines.drafter(backbone, method, module)
    elif METHODS[method].needs:
        if stream is None:
            raise UserError(f"The method {method} needs a trained stream; give its folder.")
        given = isinstance(stream, TrainedStream)
        trained = stream if given else TrainedStream.load(backbone, stream)
        trained = trained.bound_to(backbone)
        facts, tuned = trained.facts, drafts is None and exit is None  # a threshold is tuned for its exit
        if method == "m2r2-tree":  # an untuned tree has the chain's settings
            facts = {"leaves": LEAVES, "drafts": DRAFTS} | facts.get("tree", facts)
        threshold = float(facts.get("threshold", 0.0)) if tuned else 0.0
        if method == "m2r2":
            found = base.M2R2(backbone, trained.module, exit, threshold)
        else:
            found = M2R2Tree(backbone, trained.module, exit, threshold, int(facts["leaves"]))
    else:
        first, facts = _settings(stream, needed=method == "early-exit" and exit is None)
        found = {
            "early-exit": lambda: base.EarlyExit(backbone, first if exit is None else exit),
            "prompt-lookup": lambda: PromptLookup(backbone),
            "lookahead": lambda: Lookahead(backbone),
        }[method]()
    return found, int(facts.get("drafts", DRAFTS)) if drafts is None else drafts


def _settings(stream: Path | TrainedStream | None, needed: bool) -> tuple[int | None, dict]:
    """(first exit, facts) of a stream that is not run; (None, {}) if there is none and it is not
    `needed`.
    """
    from ..stream import checkpoints
    from ..stream.stream import StreamConfig

    if isinstance(stream, str | Path):
        if not needed and not (Path(stream) / "stream.json").exists():
            return None, {}
        config, facts = checkpoints.read_settings(stream, "stream", StreamConfig)
        return config.exits[0], facts
    if stream is None:
        if needed:
            raise UserError("Early exit needs the block after which it drafts; give an exit.")
        return None, {}
    return stream.module.config.exits[0], stream.facts


def training(method: str, stream: Path, drafters: Path) -> dict:
    """`parameters`, `train_steps` and `train_seconds` of a method, 0 for untrained methods.

    Args:
        stream: folder of the trained stream.
        drafters: folder of the trained baselines, one folder each.

    Raises:
        UserError: the method needs training and is not trained.
    """
    from ..stream import checkpoints
    from ..stream.stream import StreamConfig
    from . import trained as baselines

    if method in TRAINED:
        return checkpoints.trained(drafters / method, "drafter", baselines.KINDS[method].settings)
    if METHODS[method].needs:
        return checkpoints.trained(stream, "stream", StreamConfig)
    return {"parameters": 0, "train_steps": 0, "train_seconds": 0}
