"""A cache of fixed size holds what mlx-lm's holds, and passes over it compute the same."""

import mlx.core as mx
import pytest
import tiny
from mlx.utils import tree_map

from m2r2kit.model import cache as fixed_cache
from m2r2kit.model.backbone import Backbone, crop
from m2r2kit.model.cache import FEW, STEP, FixedKV
from m2r2kit.model.families import DENSE, MOE

ROWS = (9, 1, 3, 1, FEW, FEW + 1, 1)  # passes of a prompt, of one token, and of drafts


def near(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item() <= 2e-5 * max(1.0, b.abs().max().item())


def check_same(view, rows=ROWS, room=8):
    """Passes over both kinds of cache, with a step back in between."""
    text = mx.array([tiny.prompt(sum(rows))])
    fixed, growing, at = view.new_cache(room), view.new_cache(), 0
    for i, n in enumerate(rows):
        tokens = text[:, at : at + n]
        assert near(view.logits(tokens, fixed), view.logits(tokens, growing)), f"pass {i} of {n} tokens"
        at += n
        if n > 1:  # as after a draft of which one token was refused
            at -= 1
            crop(fixed, at)
            crop(growing, at)
        for mine, theirs in zip(fixed, growing, strict=True):
            assert mine.offset == theirs.offset == at
            assert all(map(near, mine.keys_and_values(), theirs.keys_and_values()))


@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_every_family(family):
    check_same(tiny.backbone(family))


def test_it_grows_when_a_text_is_longer_than_was_said():
    view = tiny.backbone(max_position_embeddings=300)
    check_same(view, (5, *([1, 7] * 20)), room=1)


def test_positions_that_cannot_be_compiled_get_mlx_lm_s_cache(tmp_path):
    """The angles of this kind depend on the length of the text, which a compiled pass does not know."""
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    view = Backbone.load(tiny.make_folder("llama", tmp_path / "dynamic", **scaling))
    assert not any(isinstance(c, FixedKV) for c in view.new_cache(8))
    check_same(view)


def test_room_is_made_in_steps():
    view = tiny.backbone()
    assert {c.keys.shape[2] for c in view.new_cache(1)} == {STEP}
    assert {c.keys.shape[2] for c in view.new_cache(STEP + 1)} == {2 * STEP}


def test_blocks_in_parts():
    """What drafting does: the blocks below the exit first, one token at a time, the rest later."""
    view, tokens = tiny.backbone(), mx.array([tiny.prompt(4)])
    parts, whole = view.new_cache(8), view.new_cache()
    lower = [view.run(view.embed(tokens[:, i : i + 1]), parts, 0, 2) for i in range(4)]
    assert [c.offset for c in parts] == [4, 4, 0, 0]
    logits = view.finish(mx.concatenate(lower, axis=1), parts, 2)
    assert near(logits, view.logits(tokens, whole))
    assert [c.offset for c in parts] == [4] * tiny.BLOCKS


@pytest.mark.parametrize(
    "settings", [{}, {"form": "attention"}, {"form": "adapter"}, {"near": False}], ids=str
)
def test_the_stream_s_step(settings):
    view, stream = tiny.backbone(), tiny.stream(**settings)
    grown = 6 + 3 * (stream.slow_depth(2) > 0)
    states = []
    for cache in (view.new_cache(8), view.new_cache()):
        view.logits(mx.array([tiny.prompt(6)]), cache)
        for verified in (6, 6, 4):
            h = view.embed(mx.array([[3]]))
            states.append(stream.step(h, cache, verified))
        assert [c.offset for c in cache] == [grown, grown, 6, 6]
    for (h, p), (h_right, p_right) in zip(states[:3], states[3:], strict=True):
        assert near(h, h_right) and near(p, p_right)


def test_the_stream_s_step_follows_training():
    view, stream = tiny.backbone(), tiny.stream()
    cache = view.new_cache(8)

    def p():
        crop(cache, 0)
        view.logits(mx.array([tiny.prompt(6)]), cache)
        return stream.step(view.embed(mx.array([[3]])), cache, 6)[1]

    before = p()
    stream.update(tree_map(lambda w: w + 0.1, stream.trainable_parameters()))
    after = p()
    growing = view.new_cache()
    view.logits(mx.array([tiny.prompt(6)]), growing)
    right = stream.step(view.embed(mx.array([[3]])), growing, 6)[1]
    assert not near(before, after) and near(after, right)


# --- broken on purpose, and caught --------------------------------------------------------


def positions(self, rows):
    return mx.arange(self.keys.shape[2] if self.traced else self.offset + rows)


def wide(self, rows, **_):
    return positions(self, rows) <= self.offset + rows + mx.arange(rows)[:, None]


def narrow(self, rows, **_):
    return positions(self, rows) < mx.maximum(self.offset + mx.arange(rows)[:, None], 1)


@pytest.mark.parametrize("mask", [wide, narrow])
def test_a_mask_off_by_one_is_caught(mask, monkeypatch):
    view = Backbone.load(tiny.folder("llama"))  # a view of its own: compiled passes are kept
    monkeypatch.setattr(FixedKV, "make_mask", mask)
    with pytest.raises(AssertionError):
        check_same(view)


def test_a_position_that_is_not_passed_on_is_caught(monkeypatch):
    view = Backbone.load(tiny.folder("llama"))
    call = fixed_cache.Traced.__call__

    def forgetful(self, cache, x, *more):
        out = call(self, cache, x, *more)
        for l in self.writes:
            cache[l].offset -= 1
        return out

    monkeypatch.setattr(fixed_cache.Traced, "__call__", forgetful)
    with pytest.raises(AssertionError):
        check_same(view)
