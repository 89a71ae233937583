"""All trained kinds of exits (`registry.KINDS`): made, trained, saved and loaded in one way.

All train on the same rows for the same number of steps; `m2r2` and `lens` have the same number of
parameters. The first exit of `m2r2` may start from a trained stream (`Exits.begin_with`), and has then
trained for longer than the others.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..common import UserError
from ..model.backbone import Backbone
from ..model.folder import trained_folder
from ..stream import checkpoints
from ..stream import train as distillation
from ..stream.distil import DistilConfig, History, TeacherBatch, distil, own_loss, teacher_batch
from ..stream.stream import AcceleratedStream, StreamConfig, intervals
from .arla import SEES, Arla, ArlaConfig
from .depths import DepthsConfig, MixtureOfDepths, Shallow, ShallowConfig
from .fill import LinearFill, fit_linear
from .readouts import BareReader, LensConfig, LensReader, StreamReader
from .train import exits_loss, gate_loss

FIT_ROWS = 256  # rows of text for the fit of a linear fill
STEPS = 800  # default
SHARES = (0.4, 0.2, 0.4)  # fractions of the steps: readers alone, readers and fill on holes, router


@dataclass(frozen=True)
class ExitsConfig:
    """Settings of trained exits.

    Attributes:
        reader: `m2r2`, `lens` or `bare`.
        exits: blocks after which a token may leave; the default fits the pocket model of 24 blocks.
        fill_rank: rank of the linear fill.
        latent: width of ARLA's latents.
        sees: residuals that ARLA reads (`arla.ArlaConfig`).
    """

    reader: str = "m2r2"
    exits: tuple[int, ...] = (1, 9, 14, 18)
    fill_rank: int = 64
    latent: int = 64
    sees: tuple[str, ...] = SEES


class Exits(nn.Module):
    """A reader, its fill and its router."""

    def __init__(self, backbone: Backbone, config: ExitsConfig):
        super().__init__()
        self._backbone, self.config = backbone, config
        N, exits = backbone.depth, config.exits
        stream = AcceleratedStream(backbone, StreamConfig(exits=exits, span=1))  # checks the exits
        if config.reader == "m2r2":
            self.reader = StreamReader(stream)
        elif config.reader == "bare":
            self.reader = BareReader(backbone, exits)
        else:
            width = stream.parameter_count() // (2 * backbone.width * len(exits))
            self.reader = LensReader(backbone, LensConfig(exits, width))
        self.fill = LinearFill(self.reader.starts, N, backbone.width, config.fill_rank)
        if config.reader != "bare":
            self.gate = self.new_gate()
        object.__setattr__(self, "started", False)

    def new_gate(self) -> Arla:
        """An untrained router."""
        c = self.config
        return Arla(self._backbone.width, ArlaConfig(len(c.exits), c.latent, c.sees))

    def begin_with(self, stream: AcceleratedStream) -> None:
        """Initialise the first exit from a trained stream of the same model.

        Raises:
            UserError: its first interval differs, or these exits read no stream.
        """
        own = self.reader.stream if "stream" in self.reader else None
        if own is None:
            raise UserError(
                f"Exits of kind {self.config.reader} read no stream; only m2r2 can start from one."
            )
        (a, b), (first, last) = intervals(own.config)[0], intervals(stream.config)[0]
        if (a, b) != (first, last):
            raise UserError(
                f"These exits cannot start from that stream: their first interval is blocks {a}..{b}, "
                f"the stream's {first}..{last}; use exit 1 for both, or leave --start out."
            )
        if stream.config != replace(own.config, exits=own.config.exits[:1], span=stream.config.span):
            raise UserError(
                f"These exits cannot start from that stream: it has other settings ({stream.config}); "
                f"train one with `m2r2kit train stream --exit {b}` and no other settings."
            )
        own.fast[0].update(stream.fast[0].trainable_parameters())
        own.carry.update(stream.carry.trainable_parameters())
        object.__setattr__(self, "started", True)

    def train_on(
        self,
        batches: list[TeacherBatch],
        rows: np.ndarray,
        settings: DistilConfig,
        report: Callable | None = None,
        seconds: float = math.inf,
    ) -> list[float]:
        """Train readers, fill and router in turn; return the loss of each step.

        Args:
            rows: texts (n, T) for the closed-form fit of the fill.
        """
        done, stream, losses = 0, self.reader.stream if "stream" in self.reader else None, []

        def part(module, loss, share, rate):
            nonlocal done
            steps = max(1, round(settings.steps * share))
            own = replace(settings, steps=steps, learning_rate=settings.learning_rate * rate)
            counted = report and (lambda step, value, before=done: report(before + step, value))
            losses.extend(distil(module, loss, batches, own, counted, seconds * share).losses)
            done += steps

        begun = [stream.fast[0], stream.carry] if self.started else []
        for ready in begun:
            ready.freeze()  # it is already trained; the other exits are not
        if self.config.reader != "bare":
            part(self.reader, exits_loss, SHARES[0], 1)
        for ready in begun:
            ready.unfreeze()
        depths, blocks = self.needs()
        depths |= set(range(self._backbone.depth + 1))
        texts = (
            teacher_batch(self._backbone, rows[i : i + 16], depths, blocks) for i in range(0, len(rows), 16)
        )
        self.fill = fit_linear(
            self.reader, texts, self._backbone.depth, self._backbone.width, self.config.fill_rank
        )
        both, rate = Pair(self.reader, self.fill), 0.1 if self.started else 0.5
        part(both, lambda m, *x: exits_loss(m.reader, *x, m.fill), SHARES[1], rate)
        if "gate" in self:
            part(self.gate, self.router_loss, SHARES[2], 1)
        return losses

    def router_loss(
        self, gate: Arla, batch: TeacherBatch, settings: DistilConfig, rng: np.random.Generator
    ) -> mx.array:
        """Loss of the router, with everything else frozen."""
        return gate_loss(gate, self.reader, batch, settings, rng, self.fill)

    def needs(self) -> tuple[set[int], set[int]]:
        """The depths whose states and the blocks whose keys and values a teacher batch must hold."""
        depths, blocks = self.reader.needs()
        return depths | set(self.reader.starts), blocks | set(self.reader.reads)


class Pair(nn.Module):
    """A reader and a fill, trained together."""

    def __init__(self, reader, fill):
        super().__init__()
        self.reader, self.fill = reader, fill


MODULES = {DepthsConfig: MixtureOfDepths, ShallowConfig: Shallow, ExitsConfig: Exits}


def settings_of(kind: str, exits: tuple[int, ...] = ExitsConfig.exits):
    """The settings of a kind with these exits; for `shallow` the first exit is its number of blocks."""
    if kind == "mixture-of-depths":
        return DepthsConfig()
    return ShallowConfig(exits[0]) if kind == "shallow" else ExitsConfig(reader=kind, exits=exits)


def default_exits(kind: str, depth: int) -> tuple[int, ...]:
    """Default exits for a model of `depth` blocks, at the relative depths of the pocket model's
    (`ExitsConfig.exits`); for `shallow` its number of blocks.
    """
    pocket, blocks = (ShallowConfig().blocks,) if kind == "shallow" else ExitsConfig().exits, 24
    scaled = {min(max(1, round(exit * depth / blocks)), depth - 1) for exit in pocket}
    return tuple(sorted(scaled))


def new(backbone: Backbone, kind: str, exits: tuple[int, ...] | None = None, seed: int = 0) -> nn.Module:
    """An untrained module of a kind.

    Raises:
        UserError: the model cannot have these exits.
    """
    mx.random.seed(seed)
    config = settings_of(kind, exits or default_exits(kind, backbone.depth))
    return MODULES[type(config)](backbone, config)


def train(
    backbone: Backbone,
    module: nn.Module,
    rows: np.ndarray,
    settings: DistilConfig,
    batch: int = 8,
    report: Callable | None = None,
    seconds: float = math.inf,
    router_only: bool = False,
) -> History:
    """Train a module on rows of text (n, T), in batches of `batch` rows, until the settings' steps or
    `seconds` are over. `router_only` trains a new router for an already trained `Exits`, with all of the
    steps.
    """
    depths, blocks = module.needs() if isinstance(module, Exits) else ({backbone.depth}, set())
    batches = distillation.teacher_batches(backbone, rows, depths, blocks, batch)
    begun = time.perf_counter()
    if router_only:
        mx.random.seed(settings.seed)
        module.gate = module.new_gate()
        losses = distil(module.gate, module.router_loss, batches, settings, report, seconds).losses
    elif isinstance(module, Exits):
        losses = module.train_on(batches, rows[:FIT_ROWS], settings, report, seconds)
    else:
        losses = distil(module, own_loss, batches, settings, report, seconds).losses
    return History(losses, time.perf_counter() - begun)


def folder(model: str | Path, exits: str | Path | None) -> Path:
    """The folder of a model's trained exits, with one folder for each kind: `exits` if given, else
    `trained_folder`.
    """
    return Path(exits) if exits else trained_folder(model, "exits")


def parameter_counts(module: nn.Module) -> dict[str, int]:
    """Number of trained parameters of each part."""
    parts = {p: module[p] for p in ("reader", "fill", "gate") if p in module} | {"all": module}
    return {p: sum(v.size for _, v in tree_flatten(m.trainable_parameters())) for p, m in parts.items()}


def save(module: nn.Module, backbone: Backbone, folder: str | Path, **facts) -> None:
    """Write a module and the SHA-256 of its model.

    Raises:
        UserError: the folder cannot be written.
    """
    checkpoints.save(module, module.config, backbone.sha256, folder, "exits", **facts)


def load(backbone: Backbone, folder: str | Path, kind: str = "m2r2") -> tuple[nn.Module, dict]:
    """Load a saved module: (module, its whole JSON).

    Raises:
        UserError: there is none, it is of another kind, damaged, or belongs to another model.
    """
    config, text = checkpoints.read_settings(folder, "exits", type(settings_of(kind)))
    made = MODULES[type(config)]
    if text.get("kind") != made.__name__ or getattr(config, "reader", kind) != kind:
        raise UserError(f"{folder} holds no {kind}; give the folder of a trained {kind}.")
    module = checkpoints.build(made, backbone, config, folder, "exits")
    checkpoints.load_weights(module, text, backbone.sha256, folder, "exits")
    return module, text
