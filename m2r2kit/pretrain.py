"""Train a pocket model from nothing: a small `llama` that mlx-lm loads like any other.

The forward pass here computes what `mlx_lm.models.llama` computes (a test holds them
together); it is written again because training on a CPU spends most of its time in `exp`,
which MLX evaluates one element at a time. `fast_exp` is 3-5x faster.

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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models import llama

from .corpus import Batches


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
    grow_at: int = 9_000_000  # tokens after which the blocks are stacked
    first_window: int = 128  # window before growing
    muon_rate: float = 0.01
    adam_rate: float = 3e-3
    warmup_tokens: int = 400_000
    decay_share: float = 0.2
    seed: int = 0


# --- numerics -----------------------------------------------------------------------------


def fast_exp(x: mx.array) -> mx.array:
    """e^x = (e^(x/128))^128 with four terms of the series; relative error < 2e-5 for |x| < 10.

    Only products and sums, so the compiler turns it into vector instructions: 1.5 ns an
    element where `mx.exp` takes 17. Larger x are less exact: e^20 to 1e-3.
    """
    y = mx.maximum(x, -100.0) * (1 / 128)
    p = 1 + y * (1 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24))))
    for _ in range(7):
        p = p * p
    return p


@mx.custom_function
def masked_exp(scores, mask):
    return fast_exp(scores) * mask


@masked_exp.vjp
def _(primals, cotangent, output):
    return cotangent * output, mx.zeros_like(primals[1])


@mx.custom_function
def swiglu(gate, up):
    return gate * up / (1.0 + fast_exp(-gate))


@swiglu.vjp
def _(primals, cotangent, output):
    gate, up = primals
    s = 1.0 / (1.0 + fast_exp(-gate))
    silu = gate * s
    return cotangent * up * (s + silu * (1.0 - s)), cotangent * silu


ROWS = 1024  # of logits at a time: 4,096 x 4,096 numbers would come fresh from the system each time


@mx.custom_function
def cross_entropy(hidden, embedding, targets):
    """-log softmax(hidden @ embedding.T)[targets]; (n, D), (V, D), (n,) -> (n,), in nats."""
    losses = []
    for i in range(0, hidden.shape[0], ROWS):
        logits = hidden[i : i + ROWS] @ embedding.T
        right = mx.take_along_axis(logits, targets[i : i + ROWS, None], 1)[:, 0]
        losses.append(mx.log(fast_exp(logits).sum(-1)) - right)
    return mx.concatenate(losses)


@cross_entropy.vjp
def _(primals, cotangent, output):
    hidden, embedding, targets = primals
    d_embedding = mx.zeros_like(embedding).at[targets].add(-hidden * cotangent[:, None])
    d_hidden = []
    for i in range(0, hidden.shape[0], ROWS):
        h, c = hidden[i : i + ROWS], cotangent[i : i + ROWS]
        e = fast_exp(h @ embedding.T)  # again: cheaper than keeping the numbers
        weight = (c / e.sum(-1))[:, None]
        d_hidden.append((e @ embedding) * weight)
        d_embedding = d_embedding + e.T @ (h * weight)
    d_hidden = mx.concatenate(d_hidden) - embedding[targets] * cotangent[:, None]
    return d_hidden, d_embedding, mx.zeros_like(targets)


# --- the model, for training --------------------------------------------------------------


def _block(p: dict, x: mx.array, mask: mx.array, config: PretrainConfig) -> mx.array:
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
    e = masked_exp(q.reshape(B, K, H // K * T, hd) @ k.swapaxes(-1, -2), mask)
    # a column of ones beside v sums the weights in the same product
    o = e @ mx.concatenate([v, mx.ones((B, K, T, 1))], -1)
    o = (o[..., :hd] / o[..., hd:]).reshape(B, H, T, hd).transpose(0, 2, 1, 3).reshape(B, T, D)
    x = x + o @ attention["o_proj"]["weight"].T
    y = mx.fast.rms_norm(x, p["post_attention_layernorm"]["weight"], 1e-5)
    y = swiglu(y @ mlp["gate_proj"]["weight"].T, y @ mlp["up_proj"]["weight"].T)
    return x + y @ mlp["down_proj"]["weight"].T


def causal_mask(rows: int, length: int, config: PretrainConfig) -> mx.array:
    """Ones at and below the diagonal, in full: (rows, kv heads, H/K * length, length)."""
    group = config.heads // config.kv_heads
    tri = mx.tril(mx.ones((length, length)))
    shape = (rows, config.kv_heads, group, length, length)
    return mx.contiguous(mx.broadcast_to(tri, shape).reshape(rows, config.kv_heads, group * length, length))


def hidden_states(parameters: dict, tokens: mx.array, mask: mx.array, config: PretrainConfig) -> mx.array:
    """Final normalised states of a pocket model: (B, T) -> (B, T, D)."""
    p = parameters["model"]
    x = p["embed_tokens"]["weight"][tokens]
    for layer in p["layers"]:
        x = _block(layer, x, mask, config)
    return mx.fast.rms_norm(x, p["norm"]["weight"], 1e-5)


def mean_loss(parameters: dict, windows: mx.array, mask: mx.array, config: PretrainConfig) -> mx.array:
    """Mean cross-entropy of predicting each next token, in nats; windows: (B, T + 1)."""
    x = hidden_states(parameters, windows[:, :-1], mask, config)
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
    """A training run in a folder; opening the folder again goes on where it stopped."""

    def __init__(self, folder: Path, config: PretrainConfig, batches: Batches):
        self.folder, self.config, self.batches = Path(folder), config, batches
        self.step = self.seen = 0
        self.seconds, self.stopped = 0.0, False
        self.blocks = config.grow_from
        if (self.folder / "run.json").exists():
            self._load()
        else:
            self.parameters = new_parameters(config, self.blocks)
            self._new_optimizer()
        self._compile()

    def _new_optimizer(self):
        self.optimizer = optimizer(self.config)
        self.optimizer.init(self.parameters)

    def _load(self):
        state = json.loads((self.folder / "run.json").read_text())
        self.step, self.seen, self.blocks = state["step"], state["seen"], state["blocks"]
        self.seconds = state["seconds"]
        arrays = mx.load(str(self.folder / state["arrays"]))
        part = lambda head: tree_unflatten([(k[len(head) :], v) for k, v in arrays.items() if k.startswith(head)])  # noqa: E731
        self.parameters = part("p.")
        self._new_optimizer()
        self.optimizer.state = part("o.")

    def save(self):
        """Write the whole state; the old one stays until the new one is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"state-{self.step}.safetensors"
        arrays = {f"p.{k}": v for k, v in tree_flatten(self.parameters)}
        arrays |= {f"o.{k}": v for k, v in tree_flatten(self.optimizer.state)}
        mx.save_safetensors(str(self.folder / name), arrays)
        state = {"step": self.step, "seen": self.seen, "blocks": self.blocks, "seconds": self.seconds, "arrays": name}
        temporary = self.folder / "run.json.tmp"
        temporary.write_text(json.dumps(state | {"config": asdict(self.config)}, indent=1))
        temporary.replace(self.folder / "run.json")
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def _compile(self):
        config = self.config
        self.window = config.window if self.blocks == config.blocks else config.first_window
        self.rows = config.batch_tokens // self.window
        mask = causal_mask(self.rows, self.window, config)
        gradient = mx.value_and_grad(mean_loss)

        def update(parameters, state, rates, windows):
            self.optimizer.state = state
            for o, r in zip(self.optimizer.optimizers, rates, strict=True):
                o.learning_rate = r
            loss, gradients = gradient(parameters, windows, mask, config)
            return loss, self.optimizer.apply_gradients(gradients, parameters), self.optimizer.state

        self._update = mx.compile(update)

    def train(self, seconds: float = math.inf, report=print, save_every: float = 300.0):
        """Train until the tokens are used up, `seconds` have passed, or an interrupt; then save."""
        config = self.config
        previous = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        begun = saved = time.perf_counter()
        losses: list[float] = []
        try:
            while self.seen < config.tokens and not self.stopped:
                if self.blocks < config.blocks and self.seen >= config.grow_at:
                    self.parameters, self.blocks = grow(self.parameters, config.blocks), config.blocks
                    self._new_optimizer()
                    self._compile()
                started = time.perf_counter()
                share = rate(self.seen, config)
                rates = [mx.array(share * config.muon_rate), mx.array(share * config.adam_rate)]
                windows = mx.array(self.batches(self.step, self.rows, self.window + 1))
                loss, self.parameters, state = self._update(
                    self.parameters, self.optimizer.state, rates, windows
                )
                self.optimizer.state = state
                mx.eval(loss, self.parameters, state)
                losses = (losses + [loss.item()])[-50:]
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(f"the loss is not a number at step {self.step}; lower --rate")
                now = time.perf_counter()
                self.step += 1
                self.seen += self.rows * self.window
                self.seconds += now - started
                report(self, float(np.mean(losses)), self.rows * self.window / (now - started))
                if now - saved > save_every:
                    self.save()
                    saved = time.perf_counter()
                if now - begun > seconds:
                    break
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)
        self.save()

    def _stop(self, *_):
        self.stopped = True
