"""Translates a config.json of any style into one that mlx-lm computes correctly, or refuses it.

mlx-lm 0.32 ignores keys that it does not know. Models saved by transformers 5 have `rope_parameters` in place
of `rope_theta` and `rope_scaling`; most families then silently use default positions. Scalings, windows and
multipliers of newer variants are ignored too. Here each key is known, without effect, or refused.
"""

import math
from dataclasses import fields
from fnmatch import fnmatch

from ..common import UserError
from .families import FAMILIES

# Keys without effect on the forward pass: names, files, training settings and `generate` defaults.
HARMLESS = """
    _* architectures auto_map model_type torch_dtype dtype name_or_path transformers_version *_version
    quantization quantization_config use_cache *_token_id initializer_range *_dropout *_pdrop *_loss_coef
    router_jitter_noise gradient_checkpointing output_attentions output_hidden_states output_router_logits
    return_dict* torchscript use_bfloat16 is_decoder id2label label2id num_labels problem_type
    task_specific_params finetuning_task pretraining_tp unsloth_* max_position_embeddings
    max_window_layers tokenizer_class max_length min_length max_new_tokens do_sample temperature top_k
    top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size num_beams num_return_sequences
    early_stopping diversity_penalty encoder_no_repeat_ngram_size bad_words_ids num_beam_groups
    remove_invalid_values suppress_tokens exponential_decay_length_penalty forced_* begin_suppress_tokens
    chunk_size_feed_forward prefix
    attention_bias head_dim num_local_experts num_experts tie_word_embeddings *intermediate_size
""".split()  # last line: wrong values are detected when the weights are loaded

ACTIVATIONS = dict.fromkeys(("gemma", "gemma2"), ("gelu", "gelu_pytorch_tanh"))  # all others: silu
SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")
POSITIVE = (
    *("rope_theta", "rms_norm_eps", "max_position_embeddings", "original_max_position_embeddings"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
)


def translate(config: dict) -> dict:
    """The config.json of a supported family as mlx-lm needs it; keys for mlx-lm to ignore are None.

    Raises:
        UserError: a value is missing or impossible, or mlx-lm does not support the effect of a key.
    """
    family, made = FAMILIES[config["model_type"]], dict(config)
    for name in SIZES:
        if type(config.get(name)) is not int or config[name] < 1:
            raise without(name)
    if family.name == "qwen3_moe" and made.get("num_experts") is None:  # renamed by transformers 5
        made["num_experts"] = made.get("num_local_experts")
    if family.name in ("qwen3", "qwen3_moe") and made.get("head_dim") is None:
        even = made["hidden_size"] // made["num_attention_heads"]
        made["head_dim"] = 128 if family.name == "qwen3" else even
    if family.name == "gemma2":
        made.setdefault("query_pre_attn_scalar", 256)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if made.setdefault(name, 50.0 if "attn" in name else 30.0) is None:
                raise refused(name, None)
    if family.name == "phi3":
        made.setdefault("max_position_embeddings", 4096)
    activation = made.pop("hidden_activation", None) or made.pop("hidden_act", None)
    made |= {"hidden_activation": None, "hidden_act": None}
    if activation not in (None, *ACTIVATIONS.get(family.name, ("silu", "swish"))):
        raise refused("hidden_act", activation)
    made |= _positions(config, family)
    made |= dict.fromkeys(WINDOW)  # see `window`
    known = {field.name for field in fields(family.arguments())}
    for name, value in made.items():
        neutral = value is None or value is False or value == [] or value == {} or value == ""
        if name not in known and not neutral and not any(fnmatch(name, each) for each in HARMLESS):
            if value != _default(family.name, name):
                raise refused(name, value)
    _check_numbers(made, known)
    return made


def _check_numbers(made: dict, known: set[str]) -> None:
    """Refuse numbers that mlx-lm accepts but cannot compute with: logits would be NaN, or need more experts
    than there are."""
    for name in known:
        value = made.get(name)
        if isinstance(value, float) and not math.isfinite(value):
            raise without(name)
        if name in POSITIVE and isinstance(value, int | float) and not value > 0:
            raise without(name)
    experts = made.get("num_experts") or made.get("num_local_experts")
    top = made.get("num_experts_per_tok")
    if "num_experts_per_tok" in known and type(top) is type(experts) is int and not 1 <= top <= experts:
        raise without("num_experts_per_tok")


def without(name: str) -> UserError:
    """The error for a value that is missing or impossible."""
    return UserError(f"The model's config.json has no usable {name}; get its config.json again.")


def refused(name: str, value) -> UserError:
    """The error for a key whose effect mlx-lm does not support."""
    text = repr(value)
    text = text if len(text) < 60 else text[:57] + "..."
    return UserError(
        f"The model's config.json sets {name} to {text}, which mlx-lm does not support for this family; use "
        "another model, or delete the key if it changes nothing."
    )


def _default(family: str, name: str):
    """The default that transformers has for a key."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[family]().to_dict().get(name)


# --- attention windows ----------------------------------------------------------------------

WINDOW = ("sliding_window", "use_sliding_window", "layer_types")


def window(config: dict) -> int | None:
    """The length of a model's attention window, or None if it attends to all positions.

    The kit's cache keeps all positions, because a rotating cache cannot be cut back after a rejected draft.
    So the context of a model ends at its window; up to there both caches are equal.
    """
    family, width = config["model_type"], config.get("sliding_window")
    if family in ("mistral", "gemma2") and "sliding_window" not in config:
        width = 4096
    if family.startswith("qwen") and not config.get("use_sliding_window"):
        return None
    kinds = config.get("layer_types")
    if kinds and "sliding_attention" not in kinds:
        return None
    return width or None


# --- rotary positions -----------------------------------------------------------------------

ANY_SCALING = ("linear", "dynamic", "llama3", "yarn", "longrope")
SCALINGS = {"phi3": ("longrope",), "gemma": (), "gemma2": (), "qwen3_moe": (), "mixtral": ()}  # others: any
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    ),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
RENAMED = {"su": "longrope", "type": "rope_type"}


def _positions(config: dict, family) -> dict:
    """`rope_theta`, `rope_scaling` and related keys, in the style of transformers 4."""
    rope = _rope(config)
    kind = rope.pop("rope_type", None) or "default"
    kind = RENAMED.get(kind, kind)
    theta = rope.pop("rope_theta", None) or config.get("rope_theta")
    made = {
        "rope_parameters": None,
        "rope_theta": float(theta or (1e6 if family.name == "mixtral" else 1e4)),
        "rope_scaling": None,
    }
    partial = rope.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0 and family.name != "phi3":
        raise refused("partial_rotary_factor", partial)
    made["partial_rotary_factor"] = partial if family.name == "phi3" else None
    if kind == "default":
        unknown = sorted(rope.keys() - {"factor", "original_max_position_embeddings", "finetuned"})
        if unknown:
            raise refused(unknown[0], rope[unknown[0]])
        return made
    if kind not in SCALINGS.get(family.name, ANY_SCALING):
        raise refused("the scaling of positions", kind)
    _complete(kind, rope, config)
    if kind == "longrope" and family.name == "phi3":  # phi3 reads it beside the scaling
        made["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return made | {"rope_scaling": {"type": kind, "rope_type": kind, **rope}}


def _rope(config: dict) -> dict:
    """A config's settings of rotary positions as one flat dict without None."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(rope, dict) and rope and all(isinstance(each, dict) for each in rope.values()):
        kinds = [each for name, each in rope.items() if name in (config.get("layer_types") or rope)]
        if any(each != kinds[0] for each in kinds):
            raise refused("rope_parameters", "several kinds of positions")
        rope = kinds[0]
    if not isinstance(rope, dict):
        raise refused("rope_scaling", rope)
    return {RENAMED.get(name, name): value for name, value in rope.items() if value is not None}


def _complete(kind: str, rope: dict, config: dict) -> None:
    """Add transformers' defaults to `rope`; refuse keys that mlx-lm ignores and missing required ones."""
    longest = config.get("max_position_embeddings")
    if kind in ("dynamic", "longrope") and type(longest) is not int:
        raise unusable(kind, "max_position_embeddings")
    if kind in ("linear", "dynamic"):
        rope.pop("original_max_position_embeddings", None)
    elif config.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    else:
        rope.setdefault("original_max_position_embeddings", longest)
    rope.pop("finetuned", None)
    if rope.get("truncate") is True:
        del rope["truncate"]
    if kind == "yarn" and not (rope.get("mscale") and rope.get("mscale_all_dim")):
        rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    needed = ROPE_KEYS[kind] if kind != "yarn" else ("factor", "original_max_position_embeddings")
    for name in needed:
        value = rope.get(name)
        numbers = value if name in ("short_factor", "long_factor") else [value]
        if not isinstance(numbers, list) or not numbers or not all(map(_is_positive, numbers)):
            raise unusable(kind, name)
    if "factor" in rope:
        rope["factor"] = float(rope["factor"])
    implied = {"attention_factor": _attention_factor(kind, rope, longest)}
    if kind == "longrope":
        implied["factor"] = longest / rope["original_max_position_embeddings"]
    for name, value in implied.items():
        if name in rope and name not in ROPE_KEYS[kind]:
            if value is None or not math.isclose(rope[name], value, rel_tol=1e-4):
                raise refused(name, rope[name])
            del rope[name]
    if unknown := sorted(rope.keys() - set(ROPE_KEYS[kind])):
        raise refused(unknown[0], rope[unknown[0]])


def _is_positive(value) -> bool:
    """Whether a value is a finite number above 0."""
    return type(value) in (int, float) and 0 < value < math.inf


def unusable(kind: str, name: str) -> UserError:
    """The error for a scaling without a value that it needs."""
    return UserError(
        f"The model's config.json scales positions by '{kind}' without a usable {name}; get the file again."
    )


def _attention_factor(kind: str, rope: dict, longest: int | None) -> float | None:
    """The factor by which mlx-lm multiplies rotated queries and keys; None for other scalings."""
    if kind == "yarn":

        def scale(m):
            return 1.0 if rope["factor"] <= 1 else 0.1 * m * math.log(rope["factor"]) + 1.0

        return scale(rope.get("mscale", 1)) / scale(rope.get("mscale_all_dim", 0))
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        factor = longest / original
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return None
