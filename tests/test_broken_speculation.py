"""Speculation broken on purpose: the checks of `speculation_checks.py` must fail."""

import pytest
import tiny
from speculation_checks import PROMPT, Scripted, WithEnds, check_cache, check_equal, m2r2, patched, plain

from m2r2kit.speculation import M2R2, generate
from m2r2kit.speculation import decode as loop


def equal_and_cached(max_tokens=14):
    """The checks that must fail when something is broken, with three kinds of drafters."""
    tokens = plain(max_tokens=40).tokens
    half = PROMPT + [t if i % 3 else (t + 1) % tiny.EOS for i, t in enumerate(tokens)]
    yield lambda: check_equal(m2r2(), 4, max_tokens=max_tokens)
    yield lambda: check_equal(Scripted(half), 4, max_tokens=max_tokens)
    yield lambda: check_cache(Scripted(half), 4, max_tokens=max_tokens)


def assert_caught(checks, at_least=1):
    caught = 0
    for check in checks:
        try:
            check()
        except AssertionError:
            caught += 1
    assert caught >= at_least


def test_the_checks_pass_when_nothing_is_broken():
    for check in equal_and_cached():
        check()


def test_verifying_p_in_place_of_h_is_caught():
    def mixed_up(self, token, cache, verified, position):
        _, p = self.stream.step(self.backbone.embed(token), cache, verified, self.read_at)
        return p, self.backbone.head(p)

    with patched(M2R2, "_read", mixed_up), pytest.raises(AssertionError):
        check_equal(m2r2(), 4)
    with patched(M2R2, "_read", mixed_up), pytest.raises(AssertionError):
        check_cache(m2r2(), 4)


def test_a_cache_that_is_not_cropped_is_caught():
    with patched(loop, "crop", lambda cache, length: None):
        assert_caught(equal_and_cached(), at_least=3)


@pytest.mark.parametrize("off", [-1, 1])
def test_a_cache_cropped_at_the_wrong_place_is_caught(off):
    crop = loop.crop
    with patched(loop, "crop", lambda cache, length: crop(cache, length + off)):
        assert_caught(equal_and_cached(), at_least=2)


def test_a_position_off_by_one_is_caught():
    verify = loop.draft_and_verify

    def shifted(backbone, drafter, text, k, sampler, cache):
        for c in cache[drafter.exit :]:  # the rows of the verification think they stand one further
            c.offset += 1
        step = verify(backbone, drafter, text, k, sampler, cache)
        for c in cache[drafter.exit :]:
            c.offset -= 1
        return step

    with patched(loop, "draft_and_verify", shifted):
        assert_caught(equal_and_cached(), at_least=2)


def test_one_draft_too_many_is_caught():
    accept = loop.accept_greedy

    def generous(drafts, choices):
        n = len(accept(drafts, choices)) - 1
        return [*drafts[: n + 1], choices[min(n + 1, len(drafts))]] if n < len(drafts) else choices

    with patched(loop, "accept_greedy", generous):
        assert_caught(equal_and_cached(), at_least=2)


def test_ignoring_the_end_of_text_is_caught():
    tokens = plain(max_tokens=30).tokens
    view = WithEnds(tiny.backbone(), {tokens[5]})
    wanted = plain(view=view)

    def check():
        found = generate(view, PROMPT, Scripted(PROMPT + tokens, view=view), 4, 14)
        assert (found.tokens, found.stopped) == (wanted.tokens, wanted.stopped)

    check()
    with patched(loop, "until_end", lambda tokens, eos: tokens), pytest.raises(AssertionError):
        check()
