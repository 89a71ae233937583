"""Train a pocket model from nothing: a small `llama` that mlx-lm loads like any other.

The forward pass here computes what `mlx_lm.models.llama` computes (a test holds them
together); it is written again on `numerics.py`, which makes training on a CPU 3-5x faster.

Three things make few tokens go far:
- Muon for the matrices of the blocks (Jordan 2024), AdamW for embeddings and norms;
- a constant rate that falls to nothing over the last part (warm-up, stable, decay), so the
  end of training may be moved while it runs;
- depth growth: start with a third of the blocks, then stack three copies of what was
  learnt (Du et al. 2024, arXiv 2405.15319).
"""

import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models import llama

from .errors import UserError
from .numerics import attention_weights, cross_entropy, swiglu
from .tokens import Batches


@dataclass
class PretrainConfig:
    """Settings of `train backbone`; the defaults made `data/pocket-dense`."""

    blocks: int = 24
    width: int = 160
    heads: int = 4
    kv_heads: int = 2
    ffn_width: int = 320
    vocabulary: int = 4096
    context: int = 512
    tokens: int = 15_000_000
    batch_tokens: int = 4096
    window: int = 256  # tokens of one training window, once grown
    grow_from: int = 8  # blocks at the start; equal to `blocks` switches growth off
    grow_at: int = 7_500_000  # tokens after which the blocks are stacked
    first_window: int = 128  # window before growing
    muon_rate: float = 0.012
    adam_rate: float = 3e-3
    warmup_tokens: int = 400_000
    decay_share: float = 0.2
    seed: int = 0

    def __post_init__(self):
        for whole, part in (
            ("width", "heads"),
            ("heads", "kv_heads"),
            ("batch_tokens", "window"),
            ("batch_tokens", "first_window"),
            ("blocks", "grow_from"),
        ):
            if getattr(self, part) < 1 or getattr(self, whole) % getattr(self, part):
                raise UserError(f"{whole} must be a multiple of {part}; change one of the two settings")
        if self.width // self.heads % 2:
            raise UserError("width / heads must be even, because positions turn pairs of numbers")


# --- the model, for training --------------------------------------------------------------


def _block(p: dict, x: mx.array, bias: mx.array, config: PretrainConfig) -> mx.array:
    """One transformer block: (B, T, D) -> (B, T, D)."""
    B, T, D = x.shape
    H, K = config.heads, config.kv_heads
    hd = D // H
    attention, mlp = p["self_attn"], p["mlp"]
    rope = partial(mx.fast.rope, dims=hd, traditional=False, base=10000.0, scale=1.0, offset=0)

    def heads(y, w, n):
        return (y @ w["weight"].T).reshape(B, T, n, hd).transpose(0, 2, 1, 3)  # (B, n, T, hd)

    y = mx.fast.rms_norm(x, p["input_layernorm"]["weight"], 1e-5)
    q = rope(heads(y, attention["q_proj"], H)) * hd**-0.5
    k = rope(heads(y, attention["k_proj"], K))
    v = heads(y, attention["v_proj"], K)
    # query heads of one key head side by side: (B, K, H/K * T, hd)
    e = attention_weights(q.reshape(B, K, H // K * T, hd) @ k.swapaxes(-1, -2), bias)
    # a column of ones beside v sums the weights in the same product
    o = e @ mx.concatenate([v, mx.ones((B, K, T, 1))], -1)
    o = (o[..., :hd] / o[..., hd:]).reshape(B, H, T, hd).transpose(0, 2, 1, 3).reshape(B, T, D)
    x = x + o @ attention["o_proj"]["weight"].T
    y = mx.fast.rms_norm(x, p["post_attention_layernorm"]["weight"], 1e-5)
    y = swiglu(y @ mlp["gate_proj"]["weight"].T, y @ mlp["up_proj"]["weight"].T)
    return x + y @ mlp["down_proj"]["weight"].T


def causal_bias(rows: int, length: int, config: PretrainConfig) -> mx.array:
    """0 at and below the diagonal, -1e9 above: (rows, kv heads, H/K * length, length).

    In full, because the compiled kernels read it faster than they broadcast it.
    """
    group = config.heads // config.kv_heads
    bias = mx.where(mx.tri(length) > 0, 0.0, -1e9)
    shape = (rows, config.kv_heads, group, length, length)
    return mx.contiguous(mx.broadcast_to(bias, shape).reshape(rows, config.kv_heads, group * length, length))


def hidden_states(parameters: dict, tokens: mx.array, bias: mx.array, config: PretrainConfig) -> mx.array:
    """Final normalised states of a pocket model: (B, T) -> (B, T, D)."""
    p = parameters["model"]
    x = p["embed_tokens"]["weight"][tokens]
    for layer in p["layers"]:
        x = _block(layer, x, bias, config)
    return mx.fast.rms_norm(x, p["norm"]["weight"], 1e-5)


def mean_loss(parameters: dict, windows: mx.array, bias: mx.array, config: PretrainConfig) -> mx.array:
    """Mean cross-entropy of predicting each next token, in nats; windows: (B, T + 1)."""
    x = hidden_states(parameters, windows[:, :-1], bias, config)
    embedding = parameters["model"]["embed_tokens"]["weight"]
    return cross_entropy(x.reshape(-1, x.shape[-1]), embedding, windows[:, 1:].reshape(-1)).mean()


def hf_config(config: PretrainConfig, blocks: int) -> dict:
    """The `config.json` of a pocket model: a standard `llama`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.width,
        "num_hidden_layers": blocks,
        "intermediate_size": config.ffn_width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.width // config.heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def new_parameters(config: PretrainConfig, blocks: int) -> dict:
    """Random weights in mlx-lm's own tree."""
    mx.random.seed(config.seed)
    model = llama.Model(llama.ModelArgs.from_dict(hf_config(config, blocks)))
    p = model.parameters()
    embedding = p["model"]["embed_tokens"]["weight"]
    p["model"]["embed_tokens"]["weight"] = mx.random.normal(embedding.shape) * 0.02
    for layer in p["model"]["layers"]:  # residual branches start at zero: each block starts as identity
        for part, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
            layer[part][name]["weight"] = mx.zeros_like(layer[part][name]["weight"])
    return p


def grow(parameters: dict, blocks: int) -> dict:
    """Stack copies of the blocks until there are `blocks` (G_stack of arXiv 2405.15319)."""
    layers = parameters["model"]["layers"]
    stacked = [tree_map(mx.array, layers[i % len(layers)]) for i in range(blocks)]
    return {"model": {**parameters["model"], "layers": stacked}}


# --- the run ------------------------------------------------------------------------------


def optimizer(config: PretrainConfig):
    """Muon for the blocks' matrices, AdamW for the rest."""
    return optim.MultiOptimizer(
        [
            optim.Muon(learning_rate=config.muon_rate, weight_decay=0.0),
            optim.AdamW(learning_rate=config.adam_rate, betas=[0.9, 0.95], weight_decay=0.0),
        ],
        [lambda name, weight: "layers" in name and weight.ndim == 2],
    )


def rate(seen: int, config: PretrainConfig) -> float:
    """Share of the full learning rate after `seen` tokens: warm-up, stable, linear decay."""
    left = (config.tokens - seen) / (config.tokens * config.decay_share)
    return max(0.0, min(1.0, seen / config.warmup_tokens + 0.01, left))


class Run:
    """A training run in a folder; opening the folder again goes on where it stopped.

    Args:
        folder: holds `run.json` and `state-STEP.safetensors`; made by the first save.
        config: None takes that of the folder. A run that exists may be given other values of
            `tokens` and `decay_share` (the end may be moved), and of nothing else.
        batches: may be None where nothing is trained.
    """

    MOVABLE = ("tokens", "decay_share")

    def __init__(self, folder: Path, config: PretrainConfig | None = None, batches: Batches | None = None):
        self.folder, self.batches = Path(folder), batches
        self.step = self.seen = 0
        self.seconds, self.stopped = 0.0, False
        if (self.folder / "run.json").exists():
            self._load(config)
        else:
            self.config = config or PretrainConfig()
            self.blocks = self.config.grow_from
            self.parameters = new_parameters(self.config, self.blocks)
            self._new_optimizer()
        self._compile()

    def _new_optimizer(self):
        self.optimizer = optimizer(self.config)
        self.optimizer.init(self.parameters)

    def _load(self, config: PretrainConfig | None):
        again = f"copy the folder again, whole, or start anew in another one than {self.folder}"
        try:
            state = json.loads((self.folder / "run.json").read_text())
            self.step, self.seen, self.blocks = state["step"], state["seen"], state["blocks"]
            self.seconds, old = state["seconds"], PretrainConfig(**state["config"])
            file = self.folder / state["arrays"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"run.json cannot be read as a training run; {again}") from None
        self.config = config or old
        for name, value in asdict(old).items():
            wanted = getattr(self.config, name)
            if wanted != value and name not in self.MOVABLE:
                here = f"the run in {self.folder} has {name} = {value}, not {wanted}"
                raise UserError(f"{here}; start anew in another folder")
        if not is_whole(file):
            raise UserError(f"{file.name} is missing or not whole; {again}")
        arrays = mx.load(str(file))
        self.parameters = _part(arrays, "p.")
        self._new_optimizer()
        self.optimizer.state = _part(arrays, "o.")

    def save(self):
        """Write the whole state; the old one stays until the new one is complete."""
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
        new_arrays, new_state = self.folder / "new.safetensors", self.folder / "run.json.new"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            mx.save_safetensors(str(new_arrays), arrays)
            new_state.write_text(json.dumps(state, indent=1))
            new_arrays.replace(self.folder / name)
            new_state.replace(self.folder / "run.json")
        except (OSError, RuntimeError) as error:  # MLX reports a full disk as RuntimeError
            new_arrays.unlink(missing_ok=True)
            new_state.unlink(missing_ok=True)
            raise UserError(
                f"step {self.step} cannot be saved in {self.folder} ({error}); free some space and "
                "start again, from the state that was saved before"
            ) from None
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def _compile(self):
        """The step, for the number of blocks and the window of this phase."""
        config = self.config
        self.window = config.window if self.blocks == config.blocks else config.first_window
        self.rows = config.batch_tokens // self.window
        bias = causal_bias(self.rows, self.window, config)
        gradient = mx.value_and_grad(mean_loss)

        def update(parameters, state, rates, windows):
            self.optimizer.state = state
            for o, r in zip(self.optimizer.optimizers, rates, strict=True):
                o.learning_rate = r
            loss, gradients = gradient(parameters, windows, bias, config)
            return loss, self.optimizer.apply_gradients(gradients, parameters), self.optimizer.state

        self._update = mx.compile(update)

    def _grow(self):
        self.parameters, self.blocks = grow(self.parameters, self.config.blocks), self.config.blocks
        self._new_optimizer()
        self._compile()

    def train_step(self) -> float:
        """Grow if it is time, take one step, and return its loss in nats."""
        config = self.config
        if self.blocks < config.blocks and self.seen >= config.grow_at:
            self._grow()
        share = rate(self.seen, config)
        rates = [mx.array(share * config.muon_rate), mx.array(share * config.adam_rate)]
        windows = mx.array(self.batches(self.step, self.rows, self.window + 1))
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
        previous = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        begun = saved = time.perf_counter()
        losses: deque[float] = deque(maxlen=50)
        try:
            while self.seen < self.config.tokens and not self.stopped:
                started, seen = time.perf_counter(), self.seen
                losses.append(self.train_step())
                if not math.isfinite(losses[-1]):
                    raise UserError(
                        f"the loss is not a number at step {self.step}; start anew with a smaller muon_rate, "
                        "or copy an earlier state back"
                    )
                now = time.perf_counter()
                self.seconds += now - started
                if report is not None:
                    report(self, sum(losses) / len(losses), (self.seen - seen) / (now - started))
                if now - saved > save_every:
                    self.save()
                    saved = time.perf_counter()
                if now - begun > seconds:
                    break
            self.save()
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    def _stop(self, *_):
        self.stopped = True  # after the step that runs; the state between two steps is what can be saved


def _part(arrays: dict, head: str) -> dict:
    return tree_unflatten([(k.removeprefix(head), v) for k, v in arrays.items() if k.startswith(head)])


def is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says. `mx.load` reads lazily and
    would find out in the middle of the training."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return file.stat().st_size == 8 + length + max(ends)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
        return False
