"""From a name to a loaded model, and from a model object to the same view."""

import json
import shutil

import mlx.core as mx
import mlx_lm.utils
import pytest
import tiny
import tiny_experts
from mlx.utils import tree_flatten

from m2r2kit.common import UserError
from m2r2kit.experts import packing
from m2r2kit.model import load
from m2r2kit.model.backbone import Backbone
from m2r2kit.model.families import DENSE, MOE
from m2r2kit.model.load import parameters_sha256, weights_sha256

FAMILIES = DENSE + MOE
TOKENS = mx.array([tiny.prompt(7)])


def as_mlx_lm_loads(folder):
    model, config = mlx_lm.utils.load_model(folder)
    return model, mlx_lm.utils.load_tokenizer(folder, eos_token_ids=config["eos_token_id"])


# --- quantised weights ----------------------------------------------------------------------

FORMATS = [("affine", bits, 32) for bits in (3, 4, 5, 6, 8)] + [("mxfp4", 4, 32), ("nvfp4", 4, 16)]


def quantised(tmp_path, mode="affine", bits=4, group=32):
    """The folder of a tiny quantised model, written by mlx-lm."""
    model, config = mlx_lm.utils.load_model(tiny.folder("olmoe", **tiny_experts.SIZES))
    model, config = mlx_lm.utils.quantize_model(model, config, group, bits, mode)
    return written(tmp_path / "quantised", model, config)


def written(folder, model, config):
    folder.mkdir()
    mlx_lm.utils.save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny.folder("olmoe", **tiny_experts.SIZES) / name, folder)
    return folder


@pytest.mark.parametrize(("mode", "bits", "group"), FORMATS)
def test_decoded_weights_are_what_the_quantised_ones_multiply_by(tmp_path, mode, bits, group):
    folder = quantised(tmp_path, mode, bits, group)
    few, plain = (Backbone.load(folder, decode=decode) for decode in (False, True))
    assert plain.sha256 == few.sha256 == weights_sha256(folder)
    before = dict(tree_flatten(few.model.parameters()))
    after = dict(tree_flatten(plain.model.parameters()))
    assert all(w.dtype == mx.float32 for w in after.values())
    for name, w in after.items():
        q = before[name]
        if q.dtype == mx.uint32:
            path = name.removesuffix(".weight")
            scales, biases = before[f"{path}.scales"], before.get(f"{path}.biases")
            q = mx.dequantize(q, scales, biases, group, bits, mode)
        assert mx.array_equal(q, w), name
    if mode == "affine":  # the others run in bfloat16
        assert mx.allclose(few.logits(TOKENS), plain.logits(TOKENS), atol=1e-4)


def test_a_cpu_decodes_small_models_with_and_without_their_experts(tmp_path, monkeypatch):
    folder = quantised(tmp_path)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    size = 4 * sum(w.size for _, w in tree_flatten(Backbone.load(folder, decode=True).model.parameters()))
    for most, plain in ((size, on_cpu), (size - 1, False)):
        monkeypatch.setattr(load, "DECODED", most)
        taken = packing.load_without_experts(folder)
        blocks = Backbone.load(folder).blocks[0], taken[0].blocks[0]
        found = [block.self_attn.q_proj for block in blocks]
        found += [blocks[0].mlp.switch_mlp.up_proj, taken[1][0].up_proj]
        assert [("scales" not in linear) for linear in found] == 4 * [plain]


def test_a_decoded_model_object_has_the_hash_of_its_folder(tmp_path):
    folder = quantised(tmp_path)
    for decode in (True, False):
        view = Backbone.load(folder, decode=decode)
        assert Backbone.of(view.model, view.tokenizer).sha256 == weights_sha256(folder)
    view.model.model.norm.weight = view.model.model.norm.weight + 1
    assert Backbone.of(view.model, view.tokenizer).sha256 == parameters_sha256(view.model)


# --- model objects --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_object_gives_the_view_of_its_folder(family):
    loaded = tiny.backbone(family)
    view = Backbone.of(*as_mlx_lm_loads(tiny.folder(family)))
    assert mx.array_equal(view.logits(TOKENS), loaded.logits(TOKENS))
    assert (view.family, view.depth, view.width) == (family, tiny.BLOCKS, tiny.WIDTH)
    assert view.context == tiny.CONTEXT and view.eos == loaded.eos
    assert view.config["vocab_size"] == tiny.VOCABULARY
    assert view.sha256 == loaded.sha256 == weights_sha256(tiny.folder(family))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_the_hash_does_not_depend_on_the_arithmetic(dtype):
    model, tokenizer = as_mlx_lm_loads(tiny.folder("llama"))
    model.set_dtype(dtype)
    narrow = parameters_sha256(model)
    assert Backbone.of(model, tokenizer).sha256 == weights_sha256(tiny.folder("llama"))
    model.set_dtype(mx.float32)  # the values of the narrow model, which the folder does not hold
    assert parameters_sha256(model) == narrow == Backbone.of(model, tokenizer).sha256


def test_a_changed_model_has_another_hash_and_a_model_without_a_folder_has_one():
    model, tokenizer = as_mlx_lm_loads(tiny.folder("llama"))
    model.model.norm.weight = model.model.norm.weight + 1
    changed = Backbone.of(model, tokenizer).sha256
    assert changed == parameters_sha256(model) != weights_sha256(tiny.folder("llama"))
    assert Backbone.of(model, tokenizer=object()).sha256 == changed


def test_what_is_no_language_model_is_refused():
    with pytest.raises(UserError, match="is not a language model"):
        Backbone.of(object(), object())
