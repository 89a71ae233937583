"""Trained baselines: made, trained, saved and loaded in one way.

Each is a small module beside the frozen model, with a `loss`, the `depths` of the states that its loss
reads, and a drafter that decodes with it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..common import UserError
from ..model.backbone import Backbone
from ..stream import checkpoints
from ..stream.distil import DistilConfig, History, TeacherBatch, distil, own_loss
from .drafters.base import Drafter
from .drafters.deed import Deed, DeedConfig, DeedExits
from .drafters.draft_model import DraftModel, DraftModelConfig, TwoModels
from .drafters.eagle import Eagle, EagleBlock, EagleConfig
from .drafters.kangaroo import Kangaroo, KangarooBlock, KangarooConfig
from .drafters.medusa import Medusa, MedusaConfig, MedusaHeads


@dataclass(frozen=True)
class Kind:
    """A kind of baseline: its settings, its module (backbone, settings), its drafter (backbone, module)."""

    settings: type
    module: type[nn.Module]
    drafter: type[Drafter]


KINDS = {
    "draft-model": Kind(DraftModelConfig, DraftModel, TwoModels),
    "eagle": Kind(EagleConfig, EagleBlock, Eagle),
    "medusa": Kind(MedusaConfig, MedusaHeads, Medusa),
    "kangaroo": Kind(KangarooConfig, KangarooBlock, Kangaroo),
    "deed": Kind(DeedConfig, DeedExits, Deed),
}


def new(backbone: Backbone, kind: str, exit: int | None = None, seed: int = 0) -> nn.Module:
    """An untrained baseline with the shapes of a model; some kinds have an `exit`."""
    mx.random.seed(seed)
    return KINDS[kind].module(backbone, KINDS[kind].settings.for_model(backbone, exit))


def train(
    module: nn.Module,
    batches: list[TeacherBatch],
    settings: DistilConfig,
    report: Callable | None = None,
    seconds: float = math.inf,
) -> History:
    """Distil a baseline from the model, with the optimiser and the teacher batches of the stream."""
    return distil(module, own_loss, batches, settings, report, seconds)


def mean_loss(module: nn.Module, batches: list[TeacherBatch], settings: DistilConfig) -> float:
    """Mean loss on teacher batches, as in training, in nats."""
    rng = np.random.default_rng(0)
    return float(np.mean([module.loss(batch, settings, rng).item() for batch in batches]))


def drafter(backbone: Backbone, kind: str, module: nn.Module) -> Drafter:
    """The drafter of a trained baseline. Make a new one after more training, because it keeps compiled
    passes.
    """
    return KINDS[kind].drafter(backbone, module)


def save(module: nn.Module, backbone: Backbone, folder: str | Path, **facts) -> None:
    """Write a baseline and the SHA-256 of its model.

    Raises:
        UserError: the folder cannot be written.
    """
    checkpoints.save(module, module.config, backbone.sha256, folder, "drafter", **facts)


def load(backbone: Backbone, kind: str, folder: str | Path) -> tuple[nn.Module, dict]:
    """Load a saved baseline: (module, its whole JSON).

    Raises:
        UserError: there is none, it is of another kind, damaged, or belongs to another model.
    """
    config, text = checkpoints.read_settings(folder, "drafter", KINDS[kind].settings)
    if text.get("kind") != KINDS[kind].module.__name__:
        raise UserError(
            f"{folder} holds a {text.get('kind')} and no {kind}; give the folder of a trained {kind}."
        )
    module = checkpoints.build(KINDS[kind].module, backbone, config, folder, "drafter")
    checkpoints.load_weights(module, text, backbone.sha256, folder, "drafter")
    return module, text
