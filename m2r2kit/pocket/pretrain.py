"""Train a pocket model from scratch, in a folder from which training resumes at any saved step.

Four methods make training data-efficient:
- Muon for the matrices of the blocks (Jordan 2024), AdamW for embeddings and norms;
- a cap on query and key matrices, without which Muon lets attention scores grow without bound;
- a warm-up, stable, decay schedule of the learning rate, so the number of tokens can change during a run;
- depth growth: train a third of the blocks, then stack three copies of them (Du et al. 2024,
  arXiv 2405.15319).
"""

import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..common import UserError, parse_json, whole
from ..model.cpu import parallel, threads
from ..model.small_llama import causal_bias
from . import llama as small_llama
from . import olmoe as small_olmoe
from .llama import PretrainConfig, grow
from .tokenizer import Batches

FAMILIES = {"llama": small_llama, "olmoe": small_olmoe}  # by mlx-lm's model type
SETTINGS = {"llama": PretrainConfig, "olmoe": small_olmoe.OlmoeConfig}
SCORE_CAP = 0.08  # root mean square of a query or key matrix; 0.046 at initialization (width 160)


def optimizer(config: PretrainConfig):
    """Muon for the blocks' matrices, AdamW for the rest.

    Routers use Muon: hidden states share a direction, and AdamW follows it until one expert serves every
    token. Experts use AdamW, because Muon's many small products would double the time of a step.
    """
    return optim.MultiOptimizer(
        [
            optim.Muon(learning_rate=config.muon_rate, weight_decay=0.0),
            optim.AdamW(learning_rate=config.adam_rate, betas=[0.9, 0.95], weight_decay=0.0),
        ],
        [lambda name, weight: "layers" in name and weight.ndim == 2],
    )


def cap_scores(parameters: dict) -> dict:
    """Scale each query and key matrix back to a root mean square of at most `SCORE_CAP`.

    Without it attention scores grow without bound under Muon, and the loss diverges after some hundred
    steps (as MuonClip of Kimi K2, on the weights instead of the scores).
    """
    for layer in parameters["model"]["layers"]:
        for name in ("q_proj", "k_proj"):
            w = layer["self_attn"][name]["weight"]
            layer["self_attn"][name]["weight"] = w * mx.minimum(1.0, SCORE_CAP * mx.rsqrt((w * w).mean()))
    return parameters


def rate(seen: int, config: PretrainConfig) -> float:
    """Share of the full learning rate after `seen` tokens: warm-up, stable, linear decay."""
    left = (config.tokens - seen) / (config.tokens * config.decay_share)
    return max(0.0, min(1.0, seen / config.warmup_tokens + 0.01, left))


def settings(values: dict) -> PretrainConfig:
    """Settings of the family `values["type"]`.

    Raises:
        ValueError: unknown type. TypeError: unknown setting.
    """
    kind = values.get("type", "llama")
    if kind not in SETTINGS:
        raise ValueError(f"type must be one of {', '.join(SETTINGS)}, not {kind}")
    return SETTINGS[kind](**values)


class Run:
    """A training run in a folder; opening the folder again resumes it.

    Args:
        folder: holds `run.json` and `state-STEP.safetensors`; created by the first save.
        config: None takes the folder's. For an existing run only settings in `MOVABLE` may differ.
        batches: may be None if nothing is trained.

    Raises:
        UserError: the folder is damaged, its settings differ, or the processes cannot share a step.
    """

    MOVABLE = ("tokens", "decay_share", "long_from", "balance")

    def __init__(self, folder: Path, config: PretrainConfig | None = None, batches: Batches | None = None):
        threads.prepare()
        self.folder, self.batches = Path(folder), batches
        self.group = parallel.group()
        self.step = self.seen = 0
        self.seconds, self.stopped = 0.0, False
        if (self.folder / "run.json").exists():
            self._load(config)
        else:
            self.config = config or PretrainConfig()
            self.blocks = self.config.grow_from
            self.parameters = FAMILIES[self.config.type].new_parameters(self.config, self.blocks)
            self._new_optimizer()
        processes = self.group.size()
        for window in (self.config.first_window, self.config.window):
            if self.config.batch_tokens // window % processes:
                raise UserError(
                    f"{self.config.batch_tokens // window} windows per step cannot be divided among "
                    f"{processes} processes; choose a number of processes that divides them"
                )
        self.loss = FAMILIES[self.config.type].loss(self.config)
        self._compile()

    def _new_optimizer(self):
        self.optimizer = optimizer(self.config)
        self.optimizer.init(self.parameters)

    def _load(self, config: PretrainConfig | None):
        again = f"restore {self.folder} from a copy, or start a new run in another folder"
        try:
            state = parse_json((self.folder / "run.json").read_text())
            self.step, self.seen, self.blocks = state["step"], state["seen"], state["blocks"]
            self.seconds, old = state["seconds"], settings(state["config"])
            file = self.folder / state["arrays"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"run.json cannot be read as a training run; {again}") from None
        self.config = config or old
        for name, value in asdict(old).items():
            wanted = getattr(self.config, name)
            if wanted != value and name not in self.MOVABLE:
                here = f"the run in {self.folder} has {name} = {value}, not {wanted}"
                raise UserError(f"{here}; start a new run in another folder")
        if not is_whole(file):
            raise UserError(f"{file.name} is missing or truncated; {again}")
        arrays = mx.load(str(file))
        self.parameters = _part(arrays, "p.")
        self._new_optimizer()
        self.optimizer.state = _part(arrays, "o.")

    def save(self):
        """Write the whole state; the old one stays until the new one is complete."""
        if self.group.rank():
            return  # all processes hold the same state; the first one writes it
        name = f"state-{self.step}.safetensors"
        arrays = {f"p.{k}": v for k, v in tree_flatten(self.parameters)}
        arrays |= {f"o.{k}": v for k, v in tree_flatten(self.optimizer.state)}
        state = {
            "step": self.step,
            "seen": self.seen,
            "blocks": self.blocks,
            "seconds": self.seconds,
            "arrays": name,
            "config": asdict(self.config),
        }
        with whole(self.folder / "run.json") as new_state, whole(self.folder / name) as new_arrays:
            mx.save_safetensors(str(new_arrays), arrays)
            new_state.write_text(json.dumps(state, indent=1))
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def _compile(self):
        """Compile the step for the current number of blocks and window."""
        config = self.config
        self.window = self._window()
        self.rows = config.batch_tokens // self.window
        bias = causal_bias(self.rows // self.group.size(), self.window, config)
        gradient = mx.value_and_grad(self.loss)

        def update(parameters, state, rates, windows):
            self.optimizer.state = state
            for o, r in zip(self.optimizer.optimizers, rates, strict=True):
                o.learning_rate = r
            loss, gradients = gradient(parameters, windows, bias)
            loss, gradients = parallel.average([loss, gradients])
            parameters = cap_scores(self.optimizer.apply_gradients(gradients, parameters))
            return loss, parameters, self.optimizer.state

        self._update = mx.compile(update)

    def _window(self) -> int:
        grown = self.blocks == self.config.blocks
        return (
            self.config.window if grown and self.seen >= self.config.long_from else self.config.first_window
        )

    def _grow(self):
        self.parameters, self.blocks = grow(self.parameters, self.config.blocks), self.config.blocks
        self._new_optimizer()
        self._compile()

    def train_step(self) -> float:
        """Grow if due, take one step, and return its loss in nats."""
        config = self.config
        if self.blocks < config.blocks and self.seen >= config.grow_at:
            self._grow()
        if self.window != self._window():
            self._compile()
        share = rate(self.seen, config)
        rates = [mx.array(share * config.muon_rate), mx.array(share * config.adam_rate)]
        windows = self.batches(self.step, self.rows, self.window + 1)
        windows = mx.array(windows[self.group.rank() :: self.group.size()])
        loss, self.parameters, state = self._update(self.parameters, self.optimizer.state, rates, windows)
        self.optimizer.state = state
        mx.eval(loss, self.parameters, state)
        self.step += 1
        self.seen += self.rows * self.window
        return loss.item()

    def train(self, seconds: float = math.inf, report: Callable | None = None, save_every: float = 300.0):
        """Train until the tokens are used up, `seconds` have passed, or an interrupt; then save.

        Args:
            report: called after each step with the run, the mean loss of the last 50 steps
                (nats) and this step's tokens/s.
            save_every: seconds between two saves.
        """
        previous = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        begun = saved = time.perf_counter()
        losses: deque[float] = deque(maxlen=50)
        try:
            while self.seen < self.config.tokens:
                started, seen = time.perf_counter(), self.seen
                losses.append(self.train_step())
                if not math.isfinite(losses[-1]):
                    raise UserError(
                        f"the loss is not finite at step {self.step}; start a new run with a smaller "
                        "muon_rate, or restore an earlier state"
                    )
                now = time.perf_counter()
                self.seconds += now - started
                if report is not None:
                    report(self, sum(losses) / len(losses), (self.seen - seen) / (now - started))
                if now - saved > save_every:
                    self.save()
                    saved = time.perf_counter()
                # all processes must stop after the same step
                if parallel.any_of(self.stopped or now - begun > seconds):
                    break
            self.save()
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    def _stop(self, *_):
        self.stopped = True  # checked between steps, when the state is consistent


def _part(arrays: dict, head: str) -> dict:
    return tree_unflatten([(k.removeprefix(head), v) for k, v in arrays.items() if k.startswith(head)])


def is_whole(file: Path) -> bool:
    """Whether a safetensors file has the length that its header gives. `mx.load` reads lazily and would fail
    only later, during training."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(length))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        return file.stat().st_size == 8 + length + max(ends)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
        return False
