"""config.json of any style: the model computes what it was trained to compute, or is refused."""

import json
import math

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import tiny
from transformers import CONFIG_MAPPING

from m2r2kit.common import UserError
from m2r2kit.model.backbone import Backbone
from m2r2kit.model.config import translate, window
from m2r2kit.model.families import DENSE, MOE

FAMILIES = DENSE + MOE
LENGTH = 40  # positions that turn far enough for scalings to show
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope", "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 4.0],
    },
}  # fmt: skip
ALL = set(SCALINGS)
COMPUTED = {family: ALL for family in FAMILIES}
COMPUTED |= {"phi3": {"longrope"}, "gemma": set(), "gemma2": set(), "qwen3_moe": set(), "mixtral": set()}


def tokens(length=LENGTH):
    return mx.array([tiny.prompt(length)])


def saved_by_transformers_5(folder):
    """The same folder with the config.json that transformers 5 would have written."""
    config = json.loads((folder / "config.json").read_text())
    family = config.pop("model_type")
    CONFIG_MAPPING[family](**config).save_pretrained(folder)
    found = json.loads((folder / "config.json").read_text())
    assert "rope_parameters" in found and not found.keys() & {"rope_theta", "rope_scaling"}
    return folder


def as_mlx_lm_computes(folder):
    model, _ = mlx_lm.utils.load_model(folder)
    return model(tokens())


# --- both styles give one function ----------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_both_styles_give_the_logits_of_mlx_lm_with_the_old_one(family, tmp_path):
    folder = tiny.make_folder(family, tmp_path / "model")
    wanted = as_mlx_lm_computes(folder)
    assert mx.array_equal(Backbone.load(folder).logits(tokens()), wanted)
    assert mx.array_equal(Backbone.load(saved_by_transformers_5(folder)).logits(tokens()), wanted)


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_positions_are_computed_in_both_styles_or_refused_in_both(family, kind, tmp_path):
    scaling = dict(SCALINGS[kind])
    scaling |= {"type": scaling["rope_type"]} if family == "phi3" else {}
    more = {"rope_scaling": scaling}
    if family == "phi3":
        more |= {"original_max_position_embeddings": 16}
    plain = tiny.make_folder(family, tmp_path / "plain")
    if kind not in COMPUTED[family]:
        folder, config = plain, tiny.config_of(family)
        for style in ({"rope_scaling": scaling}, {"rope_parameters": scaling | {"rope_theta": 1000.0}}):
            (folder / "config.json").write_text(json.dumps(config | style))
            with pytest.raises(UserError, match=f"sets the scaling of positions to '{kind}'"):
                Backbone.load(folder)
        return
    folder = tiny.make_folder(family, tmp_path / "model", **more)
    wanted = as_mlx_lm_computes(folder)
    assert mx.array_equal(Backbone.load(folder).logits(tokens()), wanted)
    assert mx.array_equal(Backbone.load(saved_by_transformers_5(folder)).logits(tokens()), wanted)
    if kind != "dynamic":  # which changes nothing up to the longest text
        assert mx.abs(wanted - as_mlx_lm_computes(plain)).max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_object_that_mlx_lm_read_as_another_function_is_refused(family, tmp_path):
    folder = saved_by_transformers_5(tiny.make_folder(family, tmp_path / "model"))
    wanted = Backbone.load(folder).logits(tokens())
    try:
        model, _ = mlx_lm.utils.load_model(folder)
    except TypeError:  # the family needs a theta, and mlx-lm says so
        return
    tokenizer = mlx_lm.utils.load_tokenizer(folder)
    if mx.array_equal(model(tokens()), wanted):
        assert mx.array_equal(Backbone.of(model, tokenizer).logits(tokens()), wanted)
    else:
        with pytest.raises(
            UserError, match=r"reads rope_theta of this model as .* means 1000\.0; load it with"
        ):
            Backbone.of(model, tokenizer)
    right = Backbone.load(folder)
    assert Backbone.of(right.model, right.tokenizer).sha256 == right.sha256


def test_a_model_object_whose_head_mlx_lm_ties_unasked_is_refused(tmp_path):
    folder = tiny.make_folder("llama", tmp_path / "model")
    config = tiny.config_of("llama")
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    model, tokenizer = mlx_lm.utils.load(str(folder))
    with pytest.raises(UserError, match="reads tie_word_embeddings of this model as True"):
        Backbone.of(model, tokenizer)


# --- rotary positions against the formulas of transformers ----------------------------------


def frequencies(kind, theta, dims, longest):
    """How far each pair turns at a position, as transformers' `modeling_rope_utils` computes it."""
    plain = theta ** -(np.arange(0, dims, 2) / dims)
    if kind == "default":
        return plain
    rope = SCALINGS[kind]
    if kind == "linear":
        return plain / rope["factor"]
    length, wave = 2 * math.pi / plain, rope["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = wave / rope["low_freq_factor"], wave / rope["high_freq_factor"]
        smooth = (wave / length - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        scaled = (1 - smooth) * plain / rope["factor"] + smooth * plain
        return np.where(length > low, plain / rope["factor"], np.where(length < high, plain, scaled))

    def correction(turns):
        return dims * math.log(wave / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(correction(32)), 0), min(math.ceil(correction(1)), dims - 1)
    ramp = 1 - np.clip((np.arange(dims // 2) - first) / max(last - first, 0.001), 0, 1)
    return plain / rope["factor"] * (1 - ramp) + plain * ramp


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if COMPUTED[f] == ALL])
def test_rotations_are_those_of_transformers(family, kind, tmp_path):
    more = {} if kind == "default" else {"rope_scaling": SCALINGS[kind]}
    folder = saved_by_transformers_5(tiny.make_folder(family, tmp_path / "model", **more))
    rope = Backbone.load(folder).blocks[0].self_attn.rope
    dims = tiny.WIDTH // 4
    turns = np.outer(np.arange(LENGTH), frequencies(kind, 1000.0, dims, tiny.CONTEXT))
    scale = 0.1 * math.log(4.0) + 1 if kind == "yarn" else 1.0
    x = np.ones((1, 1, LENGTH, dims), np.float32)
    wanted = scale * np.concatenate([np.cos(turns) - np.sin(turns), np.cos(turns) + np.sin(turns)], -1)
    assert np.abs(np.array(rope(mx.array(x)))[0, 0] - wanted).max() < 1e-4


# --- what is filled in and what is refused --------------------------------------------------


def changed(family="llama", **changes) -> dict:
    config = tiny.config_of(family) | changes
    return translate({key: value for key, value in config.items() if value is not ...})


def test_a_missing_theta_is_that_of_transformers():
    for family in FAMILIES:
        wanted = CONFIG_MAPPING[family]().rope_parameters["rope_theta"]
        assert changed(family, rope_theta=...)["rope_theta"] == wanted
        assert changed(family, rope_theta=..., rope_parameters={"rope_theta": 77})["rope_theta"] == 77


def test_a_scaling_without_its_original_length_takes_the_longest():
    scaling = {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7, "beta_fast": None}
    made = changed(rope_scaling=scaling)["rope_scaling"]
    assert made == {
        "type": "yarn", "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": tiny.CONTEXT
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "relu2"}, {"logits_scaling": 8.0}, {"attention_multiplier": 0.5}, {"qk_norm": True},
        {"partial_rotary_factor": 0.5}, {"clip_qkv": 8.0}, {"attn_logit_softcapping": 50.0},
        {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        {"rope_scaling": {"rope_type": "from_next_year", "factor": 2.0}},
        {"rope_scaling": SCALINGS["yarn"] | {"attention_factor": 1.5}},
        {"rope_scaling": SCALINGS["yarn"] | {"truncate": False}},
        {"rope_scaling": SCALINGS["longrope"] | {"long_mscale": 1.5}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1.0}, "x_attention": {"rope_theta": 2.0}}},
    ],
)  # fmt: skip
def test_what_changes_the_function_is_refused(changes):
    with pytest.raises(UserError, match=r"config.json sets .* which mlx-lm does not support") as refusal:
        changed(**changes)
    assert str(refusal.value).count(". ") == 0


def test_what_gemma2_needs_is_filled_in_as_transformers_does():
    made = changed("gemma2", query_pre_attn_scalar=..., attn_logit_softcapping=...)
    default = CONFIG_MAPPING["gemma2"]()
    for name in ("query_pre_attn_scalar", "attn_logit_softcapping"):
        assert made[name] == getattr(default, name)
    with pytest.raises(UserError, match="sets attn_logit_softcapping to None"):
        changed("gemma2", attn_logit_softcapping=None)


@pytest.mark.parametrize("missing", ["factor", "low_freq_factor", "high_freq_factor"])
def test_a_scaling_that_lacks_a_number(missing):
    scaling = {key: value for key, value in SCALINGS["llama3"].items() if key != missing}
    with pytest.raises(UserError, match=f"without a usable {missing}"):
        changed(rope_scaling=scaling)


def test_what_changes_nothing_is_let_pass():
    made = changed(
        hidden_act="silu", torch_dtype="bfloat16", attention_dropout=0.1, _name_or_path="x", use_cache=True,
        architectures=["LlamaForCausalLM"], transformers_version="5.0.0", unsloth_version="2026.1",
        logits_scaling=None, use_qk_norm=False, pretraining_tp=2, quantization={"bits": 4, "group_size": 32},
        rope_scaling=SCALINGS["yarn"] | {"attention_factor": 0.1 * math.log(4) + 1, "truncate": True},
    )  # fmt: skip
    assert made["rope_scaling"].keys() == SCALINGS["yarn"].keys() | {"type"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configs_of_transformers_itself_are_let_pass(family):
    translate(json.loads(CONFIG_MAPPING[family]().to_json_string(use_diff=False)))


# --- attention windows ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "gemma2"])
def test_a_model_is_served_up_to_its_attention_window(family, tmp_path):
    kinds = ["full_attention", "sliding_attention"] * 2 if family in ("llama", "qwen2", "qwen3") else None
    folder = tiny.make_folder(
        family, tmp_path / "model", sliding_window=12, use_sliding_window=True, layer_types=kinds
    )
    view, plain = Backbone.load(folder), tiny.backbone(family)
    assert view.context == 12 and plain.context == tiny.CONTEXT
    cache = view.new_cache()
    assert mx.array_equal(view.logits(tokens(12), cache), plain.logits(tokens(12)))
    assert mx.array_equal(view.logits(tokens(12)), as_mlx_lm_computes_of(folder, 12))
    with pytest.raises(UserError, match="The prompt has 12 tokens and the model's context is 12"):
        view.max_new_tokens(tiny.prompt(12))


def as_mlx_lm_computes_of(folder, length):
    model, tokenizer = mlx_lm.utils.load_model(folder)[0], None
    assert Backbone.of(model, tokenizer).new_cache()  # one that can be cut back
    return model(tokens(length))


def test_windows_that_are_off_or_missing():
    assert window({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}) is None
    assert window({"model_type": "mistral", "sliding_window": None}) is None
    assert window({"model_type": "mistral"}) == CONFIG_MAPPING["mistral"]().sliding_window == 4096
    full = {"model_type": "llama", "sliding_window": 8, "layer_types": ["full_attention"] * 2}
    assert window(full) is None


@pytest.mark.parametrize(("family", "why"), [("gemma3", "slides"), ("gemma3_text", "slides")])
def test_families_that_are_not_served_say_why(family, why, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(
        UserError, match=rf"Models of type '{family}' are not supported \(.*{why}.*; use one of"
    ):
        Backbone.load(tmp_path)
