"""Tiny Hugging Face folders with random weights, one a family, made by mlx-lm's own classes.

The weights are scaled so that greedy text wanders instead of repeating one token, and so that
a bare early exit is right now and then: both ends of acceptance occur in a few dozen tokens.
"""

import json
import tempfile
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import _get_classes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from m2r2kit.model.backbone import Backbone
from m2r2kit.model.families import MOE
from m2r2kit.stream.stream import AcceleratedStream, StreamConfig

WIDTH, BLOCKS, VOCABULARY, CONTEXT = 32, 4, 96, 64
EOS = VOCABULARY - 1
_FOLDERS = tempfile.TemporaryDirectory(prefix="m2r2kit-tiny-")

SIZES = {
    "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT, "rope_theta": 1000.0, "tie_word_embeddings": False,
    "eos_token_id": EOS, "pad_token_id": EOS,
}  # fmt: skip
MORE = {  # keys of some families
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 25.0},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "moe_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def config_of(family: str, **changes) -> dict:
    """The config.json of a tiny model."""
    return {"model_type": family, **SIZES, **MORE.get(family, {}), **changes}


def make_folder(family: str, folder: Path, seed: int = 0, **changes) -> Path:
    """Write config.json, model.safetensors and a tokenizer; `changes` go into config.json."""
    config = config_of(family, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    model_class, arguments = _get_classes(config)
    shapes = {k: v.shape for k, v in tree_flatten(model_class(arguments.from_dict(config)).parameters())}
    weights = _random_weights(shapes, np.random.default_rng(seed), tied="lm_head.weight" not in shapes)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_tokenizer(folder)
    return folder


def _random_weights(shapes: dict, random: np.random.Generator, tied: bool) -> dict:
    weights = {}
    for name, shape in shapes.items():
        if "norm" in name:
            w = 1 + 0.2 * random.standard_normal(shape)
        else:
            w = random.standard_normal(shape) * shape[-1] ** -0.5 * 1.5
        if "embed_tokens" in name:
            w *= 0.2 if tied else 2
        weights[name] = mx.array(w.astype(np.float32))
    if not tied:
        # token i asks for token next[i], unless the blocks say otherwise
        follows = random.permutation(shapes["lm_head.weight"][0])
        noise = random.standard_normal(shapes["lm_head.weight"]).astype(np.float32)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"][mx.array(follows)] + mx.array(noise)
    return weights


def write_tokenizer(folder: Path) -> None:
    """One token a byte of printable ASCII; the last id is the end of text."""
    letters = {chr(33 + i) if i else "Ġ": i for i in range(EOS)}
    tokenizer = Tokenizer(models.BPE(vocab=letters | {"<eos>": EOS}, merges=[], unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@cache
def folder(family: str, **changes) -> Path:
    """A tiny folder that stays until the tests end; not to be changed."""
    name = family + "".join(f"-{k}-{v}" for k, v in changes.items())
    return make_folder(family, Path(_FOLDERS.name) / name, **changes)


@cache
def backbone(family: str = "llama", **changes) -> Backbone:
    """The view of a tiny model, loaded once."""
    return Backbone.load(folder(family, **changes))


def stream(family: str = "llama", exits: tuple = (2,), size: float = 0.5, **settings) -> AcceleratedStream:
    """A stream of a tiny model whose changes are random and not zero (`size` 0: as before training)."""
    form = "attention" if family in MOE else "block"
    settings = {
        "form": form,
        "rank": 4,
        "ffn_width": 12,
        "deep": 0.75,
        "near": True,
        "carry": False,
    } | settings
    mx.random.seed(1)
    stream = AcceleratedStream(backbone(family), StreamConfig(exits=exits, **settings))
    if size:
        stream.update(
            tree_map(lambda w: w + size * mx.random.normal(w.shape) * w.shape[0] ** -0.5, stream.parameters())
        )
    return stream


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids without an end of text."""
    return np.random.default_rng([seed, length]).integers(0, EOS, length).tolist()


class Draws:
    """A random generator that notes how many positions each call of `choice` draws."""

    def __init__(self, seed: int = 0):
        self._rng, self.sizes = np.random.default_rng(seed), []

    def choice(self, among, size, replace):
        self.sizes.append(size)
        return self._rng.choice(among, size, replace)

    def __getattr__(self, name):
        return getattr(self._rng, name)
