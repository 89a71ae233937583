"""Checks of speculative decoding: equal tokens, consistent counts, an equal cache.

`test_speculation.py` and others run them on the code; `test_broken_speculation.py` runs them on code
broken on purpose, where they must fail.
"""

from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
import tiny

from m2r2kit.model import cache as fixed_cache
from m2r2kit.speculation import M2R2, EarlyExit, Generation, Plain, generate
from m2r2kit.speculation.drafters import base as drafters

PROMPT = tiny.prompt(6)
EXITS = range(1, tiny.BLOCKS)


# --- helpers ------------------------------------------------------------------------------


def plain(prompt=PROMPT, max_tokens=14, view=None) -> Generation:
    view = view or tiny.backbone()
    key = (view, tuple(prompt), max_tokens)
    if key not in KNOWN:
        KNOWN[key] = generate(view, prompt, max_tokens=max_tokens)
    return KNOWN[key]


KNOWN: dict[tuple, Generation] = {}  # plain decoding is asked for again and again


def m2r2(exit=2, threshold=0.0, **settings) -> M2R2:
    return M2R2(tiny.backbone(), tiny.stream(exits=(exit,), **settings), threshold=threshold)


class Scripted(EarlyExit):
    """Drafts given tokens by position in the text, with real states."""

    def __init__(self, text: list[int], exit=2, view=None):
        super().__init__(view or tiny.backbone(), exit)
        self.text = text

    def __call__(self, text, drafts, sampler, cache):
        draft = drafters.Draft()
        token = mx.array([[text[-1]]])
        for i in range(drafts):
            h, _ = self._read(token, cache, len(text) - 1, len(text) - 1 + i)
            token = mx.array([[self.text[len(text) + i]]])
            draft.states.append(h)
            draft.tokens.append(token)
        return draft


class WithEnds:
    """A view in which chosen tokens end the text."""

    def __init__(self, view, ends):
        self._view, self.eos = view, set(ends)

    def __getattr__(self, name):
        return getattr(self._view, name)


@contextmanager
def patched(target, name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        yield


# --- ties ---------------------------------------------------------------------------------

TIE_ULP = 16  # two logits nearer than this are equal but for rounding


def ties(view, prompt: list[int], found: list[int], wanted: list[int]) -> int:
    """How many of two greedy texts' first differences are ties: 0 (equal) or 1.

    Rows in a product change its rounding, so two logits that are all but equal may change
    places. The gap is taken from one pass over the common text (teacher forced).

    Raises:
        AssertionError: the texts differ at a position that is not a tie.
    """
    assert len(found) == len(wanted) or found[-1] in view.eos or wanted[-1] in view.eos
    for i, (a, b) in enumerate(zip(found, wanted, strict=False)):
        if a != b:
            logits = view.logits(mx.array([prompt + wanted[:i]]))[0, -1]
            largest = logits.max().item()
            gap = largest - min(logits[a].item(), logits[b].item())
            near = TIE_ULP * np.spacing(np.float32(abs(largest)))
            assert gap <= near, f"token {i}: {a} is not {b}, gap {gap}"
            return 1
    return 0


# --- the checks ---------------------------------------------------------------------------


def check_equal(drafter, drafts, prompt=PROMPT, max_tokens=14, view=None) -> tuple[Generation, int]:
    """Speculation emits what plain decoding emits, and stops where and why it stops."""
    view = view or tiny.backbone()
    wanted = plain(prompt, max_tokens, view)
    found = generate(view, prompt, drafter, drafts, max_tokens)
    tie = ties(view, prompt, found.tokens, wanted.tokens)
    if not tie:
        assert (found.tokens, found.stopped) == (wanted.tokens, wanted.stopped)
    check_counts(found, drafts)
    return found, tie


def check_counts(found: Generation, drafts: int):
    """The counts of a generation are consistent."""
    assert len(found.drafted) == len(found.accepted) == found.steps
    assert all(a <= d <= drafts for a, d in zip(found.accepted, found.drafted, strict=True))
    assert len(found.from_draft) == len(found.tokens)
    assert sum(found.from_draft) == sum(found.accepted)
    ended_in_a_draft = found.stopped == "eos" and found.from_draft[-1]
    # each step adds one token of the model's own, unless the text ended before it
    assert len(found.tokens) == sum(found.accepted) + found.steps - ended_in_a_draft


def check_cache(drafter, drafts, prompt=PROMPT, max_tokens=12, view=None, sampler=None, room=8):
    """After each step the cache is that of one fresh pass over the emitted text, less its last token.

    `room` None is mlx-lm's cache; the default is one of fixed size, so small that it must grow.
    """
    view = view or tiny.backbone()
    with patched(fixed_cache, "STEP", 8):
        cache, text, seen = view.new_cache(room), list(prompt), []
    runs_ahead = sampler is None and (drafts == 0 or isinstance(drafter, Plain))

    def after_a_step(tokens, from_draft):
        text.extend(tokens)
        fresh = view.new_cache()
        view.run(view.embed(mx.array([text])), fresh)
        kept = len(text) - 1
        for mine, theirs in zip(cache, fresh, strict=True):
            # plain decoding may already have read the newest token; speculation may not
            assert mine.offset == kept or (runs_ahead and mine.offset == kept + 1)
            for a, b in zip(mine.keys_and_values(), theirs.keys_and_values(), strict=True):
                difference = (a[..., :kept, :] - b[..., :kept, :]).abs().max().item()
                assert difference <= 2e-5 * b.abs().max().item()
        seen.append(len(tokens))

    out = generate(view, prompt, drafter, drafts, max_tokens, sampler, after_a_step, cache)
    assert text[len(prompt) :] == out.tokens and len(seen) == out.steps
    assert all(c.offset == len(prompt) + len(out.tokens) - 1 for c in cache)
    return seen
