"""A private view of a model computes with other layers; the model and MLX stay as they are."""

import sys
import threading

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from mlx.utils import tree_flatten

from m2r2kit.model.backbone import Backbone
from m2r2kit.model.compiled import LeanLinear, is_lean
from m2r2kit.model.families import DENSE, MOE
from m2r2kit.model.view import follow, private

cpu = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="only used on a CPU")


def everything(model) -> dict:
    """What a pass could change: MLX's and mlx-lm's functions, and each module of a model."""
    found = {
        "Linear": nn.Linear.__call__, "Embedding": nn.Embedding.as_linear, "RoPE": nn.RoPE.__call__,
        "attention": mx.fast.scaled_dot_product_attention, "rope": mx.fast.rope,
    }  # fmt: skip
    for name, module in list(sys.modules.items()):
        if name.startswith("mlx_lm.models."):
            found |= {(name, key): value for key, value in vars(module).items() if callable(value)}
    for name, module in model.named_modules():
        found |= {(name, key): id(value) for key, value in {**module, **vars(module)}.items()}
        found[name, "class"] = type(module)
    return found


def passes(view):
    """A prompt, a step, and positions given one by one."""
    cache = view.new_cache(8)
    view.logits(mx.array([tiny.prompt(20)]), cache)
    return view.logits(mx.array([[3]]), cache)


def loaded(family="llama"):
    return Backbone.load(tiny.folder(family))  # a view of its own: compiled passes are kept


@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_a_pass_changes_neither_the_model_nor_mlx(family):
    view = loaded(family)
    before = everything(view.model)
    mx.eval(passes(view))
    assert everything(view.model) == before
    view.blocks[0].freeze()
    assert everything(view.model) == before
    assert tree_flatten(view.model.trainable_parameters()) == tree_flatten(view.model.parameters())


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_nor_does_one_that_is_broken_off_while_it_is_traced(error, monkeypatch):
    right, inside = passes(loaded()), []

    def broken(h):
        inside.append(is_lean())
        raise error

    view = loaded()
    before = everything(view.model)
    cache = view.new_cache(8)
    monkeypatch.setattr(view, "norm", broken)
    with pytest.raises(error):
        view.logits(mx.array([[3]]), cache)
    monkeypatch.undo()
    assert inside == [mx.default_device() == mx.Device(mx.cpu)] and not is_lean()
    assert everything(view.model) == before
    assert mx.allclose(passes(view), right)


def test_two_threads_trace_at_once():
    """Both run their passes at the same time, and get what each gets alone."""
    views, found, both = [loaded("llama"), loaded("qwen3")], {}, threading.Barrier(2, timeout=60)
    right = [passes(loaded(v.family)).tolist() for v in views]
    before = [everything(v.model) for v in views]

    def run(i):
        head = views[i].head

        def waiting(h):
            if h.shape[1] == 1:  # traced
                both.wait()
            return head(h)

        views[i].head = waiting
        found[i] = passes(views[i]).tolist()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(2)] == right
    assert [everything(v.model) for v in views] == before


@cpu
@pytest.mark.parametrize("family", DENSE)
def test_the_view_has_lean_layers_and_the_model_s_arrays(family):
    view = loaded(family)
    linear = [m for m in view.blocks[0].modules() if isinstance(m, nn.Linear)]
    assert linear and all(type(m) is LeanLinear for m in linear)
    assert not any(isinstance(m, LeanLinear) for m in view.model.modules())
    mine, theirs = dict(tree_flatten(view.blocks)), dict(tree_flatten(view.model.layers))
    assert mine.keys() == theirs.keys() and all(mine[k] is theirs[k] for k in mine)


@pytest.mark.parametrize("how", ["weights", "layers"])
def test_new_weights_of_the_model_are_taken_over(how):
    view = loaded()
    block, old = view.blocks[0], passes(view)
    if how == "weights":
        view.model.update({"model": {"layers": [{"mlp": {"up_proj": {"weight": mx.ones((48, 32))}}}]}})
    else:
        nn.quantize(view.model.layers[0].self_attn, group_size=32, bits=4)
    new = passes(view)
    assert not mx.allclose(new, old, atol=1e-3)
    cache = view.model.make_cache()
    view.model(mx.array([tiny.prompt(20)]), cache=cache)
    assert mx.allclose(new, view.model(mx.array([[3]]), cache=cache), atol=1e-4)
    assert view.blocks[0] is block and not follow(view._view, view.model)


def test_a_copy_has_lists_and_frozen_parts_of_its_own():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    copy = private(module)
    copy.layers[0].freeze()
    copy.layers.append(nn.ReLU())
    assert len(module.layers) == 2 and len(tree_flatten(module.trainable_parameters())) == 4
