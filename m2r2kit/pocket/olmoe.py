"""A small `olmoe` for training: settings, weights and loss of a mixture of experts.

It computes the same function as `mlx_lm.models.olmoe` from weights of the same names (tested). Three things
make it trainable on a CPU within hours:
- initialization: embeddings, attention and experts come from a trained dense model; two of its blocks make
  one block here (sparse upcycling, Komatsuzaki et al. 2023, arXiv 2212.05055);
- distillation: the same dense model's next-token distribution is part of the target;
- `expert_tiles.expert_sum`: products of many rows at once, 20x faster than one row at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..common import UserError, parse_json
from ..model import small_llama
from ..model.cpu.fast_math import cross_entropy, soft_cross_entropy
from ..model.mlxlm import olmoe
from ..model.small_llama import attend
from .expert_tiles import expert_sum
from .llama import PretrainConfig

# Ratio of a trained model's query and key norms to those of isotropic hidden states: of 0.5, 0.7, 1, 1.4,
# 1.7, 2 and 2.8, the one with the smallest loss before training.
SHARPER = 1.7


@dataclass
class OlmoeConfig(PretrainConfig):
    """Settings of `train backbone --type olmoe`; `ffn_width` is that of one expert."""

    type: str = "olmoe"
    blocks: int = 12
    ffn_width: int = 160
    grow_from: int = 12
    tokens: int = 1_600_000
    batch_tokens: int = 2048  # with few tokens, more steps beat less noise
    long_from: int = 1_400_000
    decay_share: float = 0.67
    warmup_tokens: int = 60_000
    muon_rate: float = 0.006
    adam_rate: float = 2e-3
    experts: int = 32
    top: int = 4  # experts per token
    balance: float = 0.5  # weight of the load-balance loss; with OLMoE's 0.01 experts die within 50 steps
    router_z: float = 0.001  # weight of the router's z-loss, as in OLMoE
    start: str = ""  # folder of the dense model: initialization and teacher
    taught: float = 0.5  # weight of the teacher's next-token distribution in the target
    near: float = 0.5  # weight of the distance to the teacher's hidden states, block by block

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.top <= self.experts:
            raise UserError(f"top must be between 1 and experts ({self.experts}), not {self.top}")


def _mixture(p: dict, x: mx.array, config: OlmoeConfig) -> tuple[mx.array, mx.array]:
    """The experts of a block: (B, T, D) -> (B, T, D), and the sum of the router's two weighted losses."""
    flat = x.reshape(-1, x.shape[-1])
    logits = flat @ p["gate"]["weight"].T  # (n, experts)
    shares = mx.softmax(logits, -1)
    chosen = mx.stop_gradient(mx.argpartition(-shares, kth=config.top - 1, axis=-1)[:, : config.top])
    scores = mx.take_along_axis(shares, chosen, -1)
    y = expert_sum(flat, scores / scores.sum(-1, keepdims=True), chosen, p["switch_mlp"])
    # load-balance loss of Switch Transformers: smallest if all experts get the same share of tokens
    use = (chosen[..., None] == mx.arange(config.experts)).mean((0, 1))
    balance = config.experts * (use * shares.mean(0)).sum()
    z = mx.logsumexp(logits, -1)
    return y.reshape(x.shape), config.balance * balance + config.router_z * (z * z).mean()


def hidden_states(
    parameters: dict, tokens: mx.array, bias: mx.array, config: OlmoeConfig, teacher: list | None = None
) -> tuple[mx.array, mx.array]:
    """Final normalised hidden states of a pocket mixture, and its auxiliary loss.

    Args:
        tokens: (B, T).
        teacher: a teacher's hidden states (B, T, D) after each block, if there is one.

    Returns:
        states (B, T, D); the mean over blocks of the router's losses plus `config.near` times the squared
        distance to the teacher's state, relative to that state's square.
    """
    p = parameters["model"]
    x, extra = p["embed_tokens"]["weight"][tokens], mx.array(0.0)
    for i, layer in enumerate(p["layers"]):
        x = attend(layer, x, bias, config)
        y = mx.fast.rms_norm(x, layer["post_attention_layernorm"]["weight"], 1e-5)
        y, router = _mixture(layer["mlp"], y, config)
        x, extra = x + y, extra + router
        if teacher:
            extra = extra + config.near * (x - teacher[i]).square().mean() / teacher[i].square().mean()
    return mx.fast.rms_norm(x, p["norm"]["weight"], 1e-5), extra / len(p["layers"])


def loss(config: OlmoeConfig) -> Callable:
    """The loss of `Run`: (parameters, windows (B, T + 1), bias) -> scalar, in nats."""
    teacher = _start(config) if config.start else None

    def mean_loss(parameters, windows, bias):
        inputs, targets = windows[:, :-1], windows[:, 1:].reshape(-1)
        embedding = parameters["model"]["embed_tokens"]["weight"]
        if teacher is None:
            x, extra = hidden_states(parameters, inputs, bias, config)
            return cross_entropy(x.reshape(-1, config.width), embedding, targets).mean() + extra
        dense, known = teacher
        states = small_llama.block_states(known, inputs, bias, dense)
        per = dense.blocks // config.blocks
        taught = mx.fast.rms_norm(states[-1], known["model"]["norm"]["weight"], 1e-5)
        x, extra = hidden_states(parameters, inputs, bias, config, states[per - 1 :: per])
        x, taught = x.reshape(-1, config.width), taught.reshape(-1, config.width)
        head = known["model"]["embed_tokens"]["weight"]
        return soft_cross_entropy(x, embedding, targets, taught, head, config.taught) + extra

    return mean_loss


def hf_config(config: OlmoeConfig, blocks: int) -> dict:
    """The `config.json` of a pocket mixture: a standard `olmoe`."""
    return small_llama.hf_config(config, blocks) | {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "num_experts": config.experts,
        "num_experts_per_tok": config.top,
        "norm_topk_prob": True,  # as in Mixtral: a token's expert weights sum to 1
        "router_aux_loss_coef": config.balance,
    }


def _start(config: OlmoeConfig) -> tuple[PretrainConfig, dict]:
    """Settings and float32 weights of the dense model `config.start`.

    Raises:
        UserError: it cannot be read, is not a `llama` of `train backbone`, or does not fit the settings.
    """
    folder = Path(config.start)
    try:
        c = parse_json((folder / "config.json").read_text())
        arrays = mx.load(str(folder / "model.safetensors"))
        dense = PretrainConfig(
            blocks=c["num_hidden_layers"], width=c["hidden_size"], heads=c["num_attention_heads"],
            kv_heads=c["num_key_value_heads"], ffn_width=c["intermediate_size"],
            vocabulary=c["vocab_size"], grow_from=c["num_hidden_layers"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be read as a model of train backbone ({error})") from None
    if c.get("model_type") != "llama" or not c.get("tie_word_embeddings"):
        raise UserError(f"{folder} is not a llama with tied embeddings; start from a model of train backbone")
    for name in ("width", "heads", "kv_heads", "vocabulary"):
        if getattr(dense, name) != getattr(config, name):
            raise UserError(f"{folder} has {name} = {getattr(dense, name)}, not {getattr(config, name)}")
    if dense.blocks % config.blocks or dense.blocks // config.blocks * dense.ffn_width % config.ffn_width:
        raise UserError(f"the blocks of {folder} cannot be divided evenly; change blocks or ffn_width")
    arrays = {name: w.astype(mx.float32) for name, w in arrays.items()}
    mx.eval(arrays)  # otherwise every training step converts them again
    return dense, tree_unflatten(list(arrays.items()))


def new_parameters(config: OlmoeConfig, blocks: int) -> dict:
    """Weights in mlx-lm's parameter tree: random, or upcycled from `config.start`."""
    mx.random.seed(config.seed)
    model = olmoe.Model(olmoe.ModelArgs.from_dict(hf_config(config, blocks)))
    p = model.parameters()
    for layer in p["model"]["layers"]:  # small, so routing starts near uniform
        layer["mlp"]["gate"]["weight"] = mx.random.normal((config.experts, config.width)) * 0.02
    if config.start:
        dense = _start(config)[1]["model"]
        per = len(dense["layers"]) // blocks
        layers = [
            _upcycled(layer, dense["layers"][i * per : (i + 1) * per], config)
            for i, layer in enumerate(p["model"]["layers"])
        ]
        return {"model": {"embed_tokens": dense["embed_tokens"], "norm": dense["norm"], "layers": layers}}
    p["model"]["embed_tokens"]["weight"] = mx.random.normal((config.vocabulary, config.width)) * 0.02
    for layer in p["model"]["layers"]:  # zero residual branches: each block starts as the identity
        for branch in (layer["self_attn"]["o_proj"], layer["mlp"]["switch_mlp"]["down_proj"]):
            branch["weight"] = mx.zeros_like(branch["weight"])
    return p


def _upcycled(layer: dict, dense: list[dict], config: OlmoeConfig) -> dict:
    """One block from several dense ones: the first one's attention, and experts from all FFN neurons.

    Each expert takes `ffn_width` neurons of these FFNs, dealt from repeatedly shuffled copies. All experts
    differ, and any few of them estimate the sum of the FFNs.
    """
    first = dense[0]
    attention = {name: dict(first["self_attn"][name]) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    for name in "qk":  # the dense model has no such norm; keep the scale of its queries and keys
        w = first["self_attn"][f"{name}_proj"]["weight"] * first["input_layernorm"]["weight"]
        attention[f"{name}_norm"] = {"weight": mx.full((len(w),), SHARPER * mx.sqrt((w * w).sum(1).mean()))}
    # each dense block has its own norm before the FFN: fold it into the weights
    gate, up = (
        mx.concatenate([b["mlp"][name]["weight"] * b["post_attention_layernorm"]["weight"] for b in dense])
        for name in ("gate_proj", "up_proj")
    )
    down = mx.concatenate([b["mlp"]["down_proj"]["weight"].T for b in dense])  # (neurons, D)
    pool, wanted = len(gate), config.experts * config.ffn_width
    order = mx.concatenate([mx.random.permutation(pool) for _ in range(-(-wanted // pool))])[:wanted]
    gate, up, down = (w[order].reshape(config.experts, config.ffn_width, -1) for w in (gate, up, down))
    down = down * (pool / config.ffn_width)  # scores sum to 1, and each expert has a fraction of the neurons
    experts = {"gate_proj": gate, "up_proj": up, "down_proj": mx.contiguous(down.swapaxes(1, 2))}
    return {
        "self_attn": attention,
        "mlp": {"gate": layer["mlp"]["gate"], "switch_mlp": {n: {"weight": w} for n, w in experts.items()}},
        "input_layernorm": dict(first["input_layernorm"]),
        "post_attention_layernorm": {"weight": mx.ones(config.width)},
    }
