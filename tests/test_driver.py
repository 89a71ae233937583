"""The driver counts, stops and times any decoder."""

import time
from contextlib import contextmanager

import pytest
import tiny
import tiny_experts

from m2r2kit.common import UserError
from m2r2kit.driver import Decoder, Emitted, Generation, drive, generate, stream, until_end
from m2r2kit.experts.opening import open_experts
from m2r2kit.speculation import EarlyExit, Speculation

PROMPT = [5, 6, 7]


class Told(Decoder):
    """A decoder that emits given tokens and records its calls."""

    def __init__(self, *steps: Emitted):
        self.backbone, self.steps, self.asked, self.inside = tiny.backbone(), list(steps), [], []

    def begin(self, prompt, capacity):
        self.asked.append((list(prompt), capacity))
        time.sleep(0.01)

    def step(self, pending, left):
        self.asked.append((pending, left))
        return self.steps.pop(0)

    @contextmanager
    def threads(self):
        self.inside.append("in")
        try:
            yield
        finally:
            self.inside.append("out")


def test_steps_become_one_result():
    decoder = Told(Emitted([1, 2, 3], 4, 2), Emitted([4], 1, 0), Emitted([8, tiny.EOS], 1, 1))
    out = generate(decoder, PROMPT, 20)
    assert out.tokens == [1, 2, 3, 4, 8, tiny.EOS] and out.stopped == "eos"
    assert out.from_draft == [True, True, False, False, True, False]
    assert (out.drafted, out.accepted, out.steps, out.depth) == ([4, 1, 1], [2, 0, 1], 3, [])
    assert decoder.asked == [(PROMPT, len(PROMPT) + 20), (7, 20), (3, 17), (4, 16)]
    assert 0.01 <= out.prefill_seconds < out.seconds and decoder.inside == ["in", "out"]
    assert (out.text, out.experts) == ("", None)


def test_the_limit_is_what_was_asked_for_or_what_the_context_holds():
    for asked, left in ((1, 1), (3, 3), (10_000, tiny.CONTEXT - len(PROMPT))):
        decoder = Told(*[Emitted([1])] * left)
        out = generate(decoder, PROMPT, asked)
        assert len(out.tokens) == left and out.stopped == "length" and decoder.asked[1] == (7, left)
    for prompt, asked in (([], 1), (tiny.prompt(tiny.CONTEXT), 1), (PROMPT, 0)):
        decoder = Told()
        with pytest.raises(UserError):
            generate(decoder, prompt, asked)
        assert not decoder.asked


def test_given_tokens_follow_in_the_place_of_the_emitted():
    decoder = Told(*(Emitted([t], depth=t) for t in (1, 2, 3)))
    out = generate(decoder, PROMPT, 3, given=[7, 8, 9])
    assert [pending for pending, _ in decoder.asked[1:]] == [7, 7, 8]
    assert out.tokens == out.depth == [1, 2, 3] and out.stopped == "length"
    out = generate(Told(Emitted([1]), Emitted([2])), PROMPT, 3, given=[7, tiny.EOS, 9])
    assert out.tokens == [1, 2] and out.stopped == "eos"


def test_a_run_that_is_left_or_fails_ends_tidily():
    decoder, out = Told(*[Emitted([1])] * 5), Generation()
    for _ in drive(decoder, PROMPT, 5, out):
        break
    assert out.tokens == [1] and out.stopped is None and out.seconds > 0
    assert decoder.inside == ["in", "out"]
    decoder = Told(Emitted([1]))
    with pytest.raises(IndexError):
        generate(decoder, PROMPT, 5)
    assert decoder.inside == ["in", "out"]


def test_tokens_are_told_step_by_step():
    told = []
    steps = Emitted([1, 2], 1, 1), Emitted([3])
    generate(Told(*steps), PROMPT, 3, on_tokens=lambda tokens, drafted: told.append((tokens, drafted)))
    assert told == [([1, 2], [True, False]), ([3], [False])]


def test_until_end():
    assert until_end([1, 2, 9, 3, 9], {9}) == [1, 2, 9] and until_end([1, 2], {9}) == [1, 2]


def decoders():
    view = tiny.backbone()
    yield Speculation(view, EarlyExit(view, 2), 3)
    yield Speculation(view)
    store = tiny_experts.store()
    with_experts = open_experts(tiny_experts.model(), store.folder, reads="buffered")
    yield with_experts
    with_experts.reader.close()


def test_a_text_may_be_left_and_another_begun_but_not_gone_on_with():
    for decoder in decoders():
        wanted = generate(decoder, PROMPT, 9).tokens
        left = stream(decoder, PROMPT, 9)
        next(left)
        assert generate(decoder, PROMPT, 9).tokens == wanted
        with pytest.raises(UserError, match="another text"):
            list(left)
        assert generate(decoder, PROMPT, 9).tokens == wanted
