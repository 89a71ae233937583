"""Inputs at the ends of what a model takes: the shortest, the longest, and answers of either kind.

Every method gives the text of plain decoding, and no cache grows beyond the model's context.
"""

from functools import cache as once

import mlx.core as mx
import pytest
import tiny
from mlx.utils import tree_map
from speculation_checks import WithEnds, check_cache, check_equal, plain

from m2r2kit.bench.speculation import step_costs
from m2r2kit.model.cache import STEP, round_up
from m2r2kit.speculation import M2R2, Sampler, generate
from m2r2kit.speculation.drafters.lookahead import Lookahead
from m2r2kit.speculation.drafters.m2r2_tree import M2R2Tree
from m2r2kit.speculation.drafters.prompt_lookup import PromptLookup
from m2r2kit.stream.stream import AcceleratedStream, StreamConfig

CONTEXT = 192  # several times what a cache grows by, and a multiple of it: not a position to spare


@once
def model(context: int = CONTEXT) -> WithEnds:
    """A tiny model with a long context and no end token."""
    return WithEnds(tiny.backbone("llama", max_position_embeddings=context), ())


@once
def stream(view: WithEnds) -> AcceleratedStream:
    """A drafter that is right occasionally."""
    mx.random.seed(1)
    made = AcceleratedStream(view._view, StreamConfig(exits=(3,), rank=4, ffn_width=12))
    shaken = tree_map(lambda w: w + 0.1 * mx.random.normal(w.shape) * w.shape[0] ** -0.5, made.parameters())
    made.update(shaken)
    return made


DRAFTERS = {
    "m2r2": lambda view: M2R2(view, stream(view)),
    "m2r2 that stops": lambda view: M2R2(view, stream(view), threshold=0.05),
    "m2r2-tree": lambda view: M2R2Tree(view, stream(view), leaves=4),
    "prompt-lookup": lambda view: PromptLookup(view),
    "lookahead": lambda view: Lookahead(view),
}
each_drafter = pytest.mark.parametrize("drafter", DRAFTERS.values(), ids=DRAFTERS)


@each_drafter
def test_a_prompt_of_one_token(drafter):
    for token in (7, tiny.EOS):  # the mark of an end is a token like others where it is given
        for drafts in (1, 4, 16):
            check_equal(drafter(model()), drafts, [token], 20, model())
    check_cache(drafter(model()), 4, [7], view=model())


@each_drafter
def test_a_prompt_as_long_as_the_context_allows(drafter):
    longest = tiny.prompt(CONTEXT - 1)
    for drafts in (1, 4, 16):
        out, _ = check_equal(drafter(model()), drafts, longest, 50, model())
        assert len(out.tokens) == 1 and out.stopped == "length" and out.drafted == [0]
    for missing in (2, 3, 5):  # fewer than are drafted
        out, _ = check_equal(drafter(model()), 8, longest[:-missing], 50, model())
        assert len(out.tokens) == 1 + missing and max(out.drafted) <= missing
    for sampler in (None, Sampler(1.0, top_k=20, seed=3)):
        check_cache(drafter(model()), 8, longest[:-9], 50, model(), sampler)


@each_drafter
def test_an_answer_up_to_the_end_of_the_context(drafter):
    """And its cache has no more positions than the context, rounded up as it grows."""
    prompt, view = tiny.prompt(9), model()
    cache, sizes = view.new_cache(len(prompt)), []
    out, _ = check_equal(drafter(model()), 4, prompt, 10 * CONTEXT, view)
    assert len(out.tokens) == CONTEXT - len(prompt) and out.stopped == "length"
    assert sum(out.accepted) > 0

    def measure(tokens, from_draft):
        sizes.append(max(x.shape[2] for c in cache for x in (c.keys, c.values)))

    generate(view, prompt, drafter(model()), 4, 10 * CONTEXT, on_tokens=measure, cache=cache)
    assert sizes == sorted(sizes) and sizes[-1] == round_up(CONTEXT) == CONTEXT


@each_drafter
def test_memory_of_a_thousand_tokens_is_flat(drafter):
    """If the cache fits the text from the start, MLX's memory does not grow."""
    prompt, view = tiny.prompt(9), model(17 * STEP)
    cache, held = view.new_cache(17 * STEP), []
    generate(
        view,
        prompt,
        drafter(view),
        4,
        1000,
        on_tokens=lambda tokens, from_draft: held.extend(len(tokens) * [mx.get_active_memory()]),
        cache=cache,
    )
    assert len(held) == 1000
    position = sum(x.nbytes for c in cache for x in (c.keys, c.values)) / (17 * STEP)
    # what a step has in hand differs by its rows; 900 positions would be far more
    assert max(held[100:]) - min(held[100:]) < 50 * position


@each_drafter
def test_an_end_of_text_comes_first(drafter):
    for prompt in ([7], tiny.prompt(9), tiny.prompt(CONTEXT - 3)):
        first = plain(prompt, 14, model()).tokens[0]
        view = WithEnds(model()._view, {first})
        for drafts in (1, 4, 8):
            out, _ = check_equal(drafter(model()), drafts, prompt, 50, view)
            assert out.tokens == [first] and out.stopped == "eos"
            assert out.accepted in ([0], [1])  # a draft, or the model's own
            check_cache(drafter(model()), drafts, prompt, 50, view)


@each_drafter
def test_costs_of_a_step_after_a_long_prompt(drafter):
    """They are measured with up to 16 drafts, which may not fit after a prompt."""
    for length in (1, 2, CONTEXT - 2, CONTEXT - 1):
        c, v = step_costs(model()._view, drafter(model()), 16, tiny.prompt(length), repeats=1)
        assert abs(c) < 1e9 and v > 0
