"""From a name to a loaded model, and from a model object to the same view."""

import mlx.core as mx
import mlx_lm.utils
import pytest
import tiny

from m2r2kit.common import UserError
from m2r2kit.model.backbone import Backbone
from m2r2kit.model.families import DENSE, MOE
from m2r2kit.model.load import parameters_sha256, weights_sha256

FAMILIES = DENSE + MOE
TOKENS = mx.array([tiny.prompt(7)])


def as_mlx_lm_loads(folder):
    model, config = mlx_lm.utils.load_model(folder)
    return model, mlx_lm.utils.load_tokenizer(folder, eos_token_ids=config["eos_token_id"])


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
