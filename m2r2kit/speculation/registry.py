"""The ways of decoding by name, as the command line, the benches and the notebooks ask for them.

Only names and sentences are read when this file is imported; what a method computes with comes when it is
asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..common import Entry, UserError, registry

if TYPE_CHECKING:
    from ..model.backbone import Backbone
    from .drafters.base import Drafter

METHODS = registry(
    Entry("plain", "the model alone, one token a pass"),
    Entry("mlx_lm", "the model alone, by mlx-lm's own loop"),
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
        "a small model of its own",
        "train drafter",
        "Leviathan et al. 2023; Chen et al. 2023",
    ),
    Entry(
        "eagle",
        "a block that goes on with the last states",
        "train drafter",
        "as in EAGLE (Li et al. 2024)",
    ),
    Entry("medusa", "a head for each position ahead", "train drafter", "as in Medusa (Cai et al. 2024)"),
    Entry("kangaroo", "first blocks and a trained one", "train drafter", "as in Kangaroo (Liu et al. 2024)"),
    Entry(
        "deed", "first blocks and an adapter, sure or not", "train drafter", "as in DEED (Tang et al. 2024)"
    ),
)
TRAINED = tuple(name for name, entry in METHODS.items() if entry.needs == "train drafter")
DRAFTS = 4  # where the stream does not say better


def stream_folder(model: str | Path, stream: str | Path | None) -> Path:
    """Where the trained stream of a model lies: as given, or beside its weights."""
    return Path(stream) if stream else Path(model) / "stream"


def drafters_folder(model: str | Path, drafters: str | Path | None) -> Path:
    """Where the trained baselines of a model lie, a folder each: as given, or beside its weights."""
    return Path(drafters) if drafters else Path(model) / "drafters"


def tuned_drafts(method: str, stream: Path, drafters: Path) -> int:
    """How many drafts a method was tuned to (on tuning prompts), from its JSON; the folders are as for
    `drafter`."""
    from ..stream import checkpoints
    from ..stream.stream import StreamConfig
    from . import trained as baselines

    try:
        if method in TRAINED:
            settings = baselines.KINDS[method].settings
            facts = checkpoints.read_settings(drafters / method, "drafter", settings)[1]
        else:
            facts = checkpoints.read_settings(stream, "stream", StreamConfig)[1]
            if method == "m2r2-tree":
                facts = facts.get("tree", facts)  # before it was tuned, as long as the chain
        return int(facts.get("drafts", DRAFTS))
    except UserError:
        return DRAFTS


def drafter(
    method: str,
    backbone: Backbone,
    stream: Path,
    exit: int | None = None,
    drafters: Path | None = None,
    stops: bool = True,
) -> Drafter:
    """The drafter of a method.

    Args:
        stream: folder of the trained stream, for `m2r2`, `m2r2-tree` and the default exit of `early-exit`.
        exit: the depth at which these draft; by default the stream's first exit.
        drafters: folder of the trained baselines; by default beside the stream.
        stops: whether `m2r2` and `m2r2-tree` may end a draft where they were tuned to, or draft as many as
            they are asked for.

    Raises:
        UserError: nothing trained, or for another model, or an exit that it does not have.
    """
    from ..stream import checkpoints
    from ..stream.stream import StreamConfig, load_stream
    from . import trained as baselines
    from .drafters import base
    from .drafters.lookahead import Lookahead
    from .drafters.m2r2_tree import LEAVES, M2R2Tree
    from .drafters.prompt_lookup import PromptLookup

    if method == "plain":
        return base.Plain()
    if method == "early-exit":
        if exit is None:
            exit = checkpoints.read_settings(stream, "stream", StreamConfig)[0].exits[0]
        return base.EarlyExit(backbone, exit)
    if method == "m2r2":
        facts = checkpoints.read_settings(stream, "stream", StreamConfig)[1]
        threshold = float(facts.get("threshold", 0.0)) if stops and exit is None else 0.0  # of its own exit
        return base.M2R2(backbone, load_stream(backbone, stream), exit, threshold)
    if method == "m2r2-tree":
        facts = checkpoints.read_settings(stream, "stream", StreamConfig)[1]
        facts = {"leaves": LEAVES} | facts.get("tree", {"threshold": facts.get("threshold", 0.0)})
        threshold = float(facts["threshold"]) if stops and exit is None else 0.0
        return M2R2Tree(backbone, load_stream(backbone, stream), exit, threshold, int(facts["leaves"]))
    if method == "prompt-lookup":
        return PromptLookup(backbone)
    if method == "lookahead":
        return Lookahead(backbone)
    if method in TRAINED:
        folder = (Path(stream).parent / "drafters" if drafters is None else drafters) / method
        return baselines.drafter(backbone, method, baselines.load(backbone, method, folder)[0])
    raise UserError(f"There is no method {method}; choose {', '.join(METHODS)}.")


def training(method: str, stream: Path, drafters: Path) -> dict:
    """`parameters`, `train_steps` and `train_seconds` of a method, 0 where it trains nothing; the folders
    are as for `drafter`.

    Raises:
        UserError: it needs training and has had none.
    """
    from ..stream import checkpoints
    from ..stream.stream import StreamConfig
    from . import trained as baselines

    if method in TRAINED:
        return checkpoints.trained(drafters / method, "drafter", baselines.KINDS[method].settings)
    if METHODS[method].needs:
        return checkpoints.trained(stream, "stream", StreamConfig)
    return {"parameters": 0, "train_steps": 0, "train_seconds": 0}
