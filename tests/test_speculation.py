"""Speculation is lossless: the tokens and the cache are those of plain decoding."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.generate import generate_step
from speculation_checks import EXITS, PROMPT, Scripted, WithEnds, check_cache, check_equal, m2r2, plain, ties

from m2r2kit.common import UserError
from m2r2kit.model.backbone import crop
from m2r2kit.speculation import M2R2, EarlyExit, Plain, Sampler, generate
from m2r2kit.speculation import decode as loop

# --- ties ---


def test_a_tie_is_told_from_an_error():
    view, wanted = tiny.backbone(), plain().tokens
    assert ties(view, PROMPT, wanted, wanted) == 0
    wrong = [*wanted[:3], (wanted[3] + 1) % tiny.EOS, *wanted[4:]]
    with pytest.raises(AssertionError, match="token 3"):
        ties(view, PROMPT, wrong, wanted)
    with pytest.raises(AssertionError):
        ties(view, PROMPT, wanted[:-1], wanted)
    logits = view.logits(mx.array([PROMPT]))
    # a twin of the first choice, a few ulp away
    twin = (wanted[0] + 1) % tiny.EOS
    nearly = logits.at[0, -1, twin].add(logits[0, -1, wanted[0]] * (1 - 2e-7) - logits[0, -1, twin])

    class Undecided(WithEnds):
        def logits(self, tokens):
            return nearly

    assert ties(Undecided(view, ()), PROMPT, [twin, *wanted[1:]], wanted) == 1


# --- 0 drafts is plain decoding -----------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 9])
def test_no_drafts_is_mlx_lm_token_for_token(length):
    view, prompt = tiny.backbone(), tiny.prompt(length)
    theirs = [int(t) for t, _ in generate_step(mx.array(prompt), view.model, max_tokens=30)]
    for drafter in (None, Plain(), EarlyExit(view, 2), m2r2()):
        out = generate(view, prompt, drafter, 0, max_tokens=30)
        assert out.tokens == theirs[: len(out.tokens)]
        assert out.stopped == "eos" and out.tokens[-1] == tiny.EOS if len(out.tokens) < 30 else True
        assert out.steps == len(out.tokens) and sum(out.drafted) == 0 and not any(out.from_draft)
    assert len(set(theirs)) > 5  # the text wanders, so that a wrong token would show


# --- equality -----------------------------------------------------------------------------


@pytest.mark.parametrize("exit", EXITS)
@pytest.mark.parametrize("kind", ["early-exit", "m2r2", "carry", "stopping"])
def test_every_exit_and_every_number_of_drafts(exit, kind):
    view = tiny.backbone()
    drafter = EarlyExit(view, exit)
    if kind != "early-exit":
        drafter = m2r2(exit, 1e-30 if kind == "stopping" else 0.0, carry=kind == "carry")
    runs = [check_equal(drafter, drafts, max_tokens=10) for drafts in range(9)]
    assert sum(tie for _, tie in runs) <= 1  # of 9 texts of 10 tokens
    assert [max(out.drafted) for out, _ in runs] == list(range(9))


def test_drafts_are_sometimes_accepted():
    """Otherwise the tests of equality would see only rejections."""
    accepted = {a for drafter in (EarlyExit(tiny.backbone(), 3), m2r2(3, size=0)) for a in found(drafter)}
    assert {0, 1} < accepted


def test_a_draft_carries_the_last_state_on(monkeypatch):
    """The model's own state into the first draft, then the stream's own."""
    drafter, taken, made = m2r2(carry=True), [], []
    read = drafter.stream.read

    def watched(token, cache, verified, exit, before, position):
        h, p, logits = read(token, cache, verified, exit, before, position)
        taken.append((verified, before))
        made.append(p)
        return h, p, logits

    monkeypatch.setattr(drafter.stream, "read", watched, raising=False)
    out = generate(tiny.backbone(), PROMPT, drafter, 3, 9)
    final = tiny.backbone().states(mx.array([PROMPT + out.tokens]))[-1]
    assert len({verified for verified, _ in taken}) >= 2
    for i, (verified, before) in enumerate(taken):
        is_first = i == 0 or taken[i - 1][0] != verified
        right = final[:, verified - 1 : verified] if is_first else made[i - 1]
        assert mx.allclose(before, right, atol=1e-4)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_draft_ends_where_it_is_no_longer_sure(carry, temperature, monkeypatch):
    """After the token that makes the chance of all so far fall below the threshold."""
    view, drafter = tiny.backbone(), m2r2(carry=carry, size=0.1)
    ids, cache = PROMPT, view.new_cache(64)
    view.run(view.embed(mx.array([ids[:-1]])), cache)
    sure = []
    read = drafter._read

    def watched(*token):
        h, logits = read(*token)
        sure.append(mx.softmax(logits[0, -1]))
        return h, logits

    monkeypatch.setattr(drafter, "_read", watched)
    drafter.threshold = 1e-30
    whole = drafter(ids, 6, Sampler(temperature), cache)
    tokens = [t if isinstance(t, int) else t.item() for t in whole.tokens]
    chances = np.cumprod([p[t].item() for p, t in zip(sure, tokens, strict=True)])
    assert len(tokens) == 6 and (chances[1:] < chances[:-1]).all()
    for stop in range(1, 6):
        crop(cache, len(ids) - 1)
        drafter.begin(ids, 64)
        drafter.threshold = (chances[stop - 1] + chances[stop]) / 2
        draft = drafter(ids, 6, Sampler(temperature), cache)
        assert [t if isinstance(t, int) else t.item() for t in draft.tokens] == tokens[: stop + 1]
        assert len(draft.states) == stop + 1 == cache[0].offset - len(ids) + 1


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.5])
def test_drafts_of_any_length_are_verified(threshold):
    out, _ = check_equal(m2r2(threshold=threshold, size=0.1), 6, max_tokens=14)
    check_cache(m2r2(threshold=threshold, size=0.1), 6)
    assert min(out.drafted[:-1]) >= 1 and max(out.drafted) <= 6


def found(drafter):
    return generate(tiny.backbone(), PROMPT, drafter, 4, 30).accepted


@pytest.mark.parametrize("length", [1, 2, 3, 17])
def test_prompt_lengths(length):
    for drafter in (EarlyExit(tiny.backbone(), 2), m2r2(), m2r2(form="attention"), m2r2(carry=True)):
        check_equal(drafter, 3, tiny.prompt(length), 8)


@pytest.mark.parametrize("drafts", [1, 4, 8])
def test_all_drafts_accepted(drafts):
    text = PROMPT + plain(max_tokens=30).tokens
    out, _ = check_equal(Scripted(text), drafts, max_tokens=14)
    assert out.accepted == out.drafted and out.drafted[0] == drafts
    assert out.steps == -(-14 // (drafts + 1))


@pytest.mark.parametrize("drafts", [1, 4, 8])
def test_none_accepted(drafts):
    text = PROMPT + [(t + 1) % tiny.EOS for t in plain(max_tokens=30).tokens]
    out, _ = check_equal(Scripted(text), drafts, max_tokens=8)
    assert out.steps == 8 and set(out.accepted) == {0} and not any(out.from_draft)


@pytest.mark.parametrize("right", [True, False])
def test_the_limit_inside_a_draft(right):
    text = PROMPT + [(t + (not right)) % tiny.EOS for t in plain(max_tokens=30).tokens]
    for limit in range(1, 8):
        out, _ = check_equal(Scripted(text), 4, max_tokens=limit)
        assert len(out.tokens) == limit and out.stopped == "length"
        assert out.drafted[0] == min(4, limit - 1)  # no draft is made that could not be emitted


def test_end_of_text_inside_a_draft():
    tokens = plain(max_tokens=30).tokens
    firsts = [i for i in range(1, 8) if tokens[i] not in tokens[:i]]
    assert len(firsts) > 3
    for i in firsts:
        view = WithEnds(tiny.backbone(), {tokens[i]})
        for drafts in (1, 4, 8):
            drafter = Scripted(PROMPT + tokens, view=view)
            out, _ = check_equal(drafter, drafts, view=view)
            assert out.tokens == tokens[: i + 1] and out.stopped == "eos"
            check_cache(drafter, drafts, view=view)
        # the drafter drafts an end of text that the model does not want
        wrong = [*tokens[: i - 1], tokens[i], *tokens[i:]]
        check_equal(Scripted(PROMPT + wrong, view=view), 4, view=view)


def test_text_up_to_the_end_of_the_context():
    view = tiny.backbone()
    longest = tiny.prompt(tiny.CONTEXT - 1)
    for drafter in (None, EarlyExit(view, 2), m2r2()):
        out = generate(view, longest, drafter, 4, 50)
        assert len(out.tokens) == 1 and sum(out.drafted) == 0
        with pytest.raises(UserError, match=f"The prompt has {tiny.CONTEXT} tokens"):
            generate(view, tiny.prompt(tiny.CONTEXT), drafter, 4, 50)
    near = tiny.prompt(tiny.CONTEXT - 7, seed=1)
    view = WithEnds(view, ())
    for drafter in (EarlyExit(view, 2), m2r2(), Scripted(near + plain(near, 7, view).tokens)):
        out, _ = check_equal(drafter, 8, near, 50, view)
        assert len(out.tokens) == 7 and out.stopped == "length"


def test_text_beyond_the_cache_s_first_allocation():
    """mlx-lm's cache grows by 256 positions at a time; a draft may lie across that edge."""
    view = WithEnds(tiny.backbone("llama", max_position_embeddings=300), ())
    prompt = tiny.prompt(250)
    text = prompt + plain(prompt, 12, view).tokens
    for drafter in (Scripted(text, view=view), EarlyExit(view, 2)):
        check_equal(drafter, 4, prompt, 12, view)
        check_cache(drafter, 4, prompt, 12, view)
        check_cache(drafter, 4, prompt, 12, view, room=None)


# --- the cache ----------------------------------------------------------------------------


@pytest.mark.parametrize("room", [None, 8])
@pytest.mark.parametrize("exit", EXITS)
def test_the_cache_after_each_step(exit, room):
    text = PROMPT + plain(max_tokens=30).tokens
    half = PROMPT + [t if i % 3 else (t + 1) % tiny.EOS for i, t in enumerate(plain(max_tokens=30).tokens)]
    steps = set()
    for drafter in (m2r2(exit), EarlyExit(tiny.backbone(), exit), Scripted(text, exit), Scripted(half, exit)):
        steps |= set(check_cache(drafter, 4, room=room))
    assert {1, 3, 5} <= steps  # none, some and all accepted


def test_the_cache_of_plain_decoding():
    assert set(check_cache(Plain(), 4)) == set(check_cache(EarlyExit(tiny.backbone(), 2), 0)) == {1}


def test_the_cache_while_sampling():
    view = tiny.backbone()
    for drafter in (Plain(), EarlyExit(view, 2), m2r2()):
        check_cache(drafter, 3, max_tokens=8, sampler=Sampler(1.0, top_k=20, seed=3))


def test_a_step_leaves_one_position_a_row_and_reports_what_it_emitted():
    view, text = tiny.backbone(), PROMPT + plain(max_tokens=30).tokens
    cache = view.new_cache()
    view.run(view.embed(mx.array([PROMPT[:-1]])), cache)
    emitted, drafted, _ = loop.draft_and_verify(view, Scripted(text), PROMPT, 3, Sampler(), cache)
    assert emitted == text[len(PROMPT) :][:4] and drafted == 3
    assert [c.offset for c in cache] == [len(PROMPT) + 3] * tiny.BLOCKS


# --- what is told on the way, and what is refused -----------------------------------------


def test_tokens_are_told_as_they_come():
    told = []
    text = PROMPT + plain(max_tokens=30).tokens
    out = generate(tiny.backbone(), PROMPT, Scripted(text), 3, 10, on_tokens=lambda t, d: told.append((t, d)))
    assert [len(t) for t, _ in told] == [4, 4, 2]
    assert [d for _, d in told] == [[True] * 3 + [False], [True] * 3 + [False], [True, False]]
    assert [t for tokens, _ in told for t in tokens] == out.tokens and out.seconds > 0


def test_bad_requests_are_one_sentence():
    view = tiny.backbone()
    for request, sentence in [
        ({"prompt": []}, "The prompt is empty"),
        ({"drafts": -1}, "between 0 and 16; got -1"),
        ({"drafts": 17}, "between 0 and 16; got 17"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ]:
        with pytest.raises(UserError, match=sentence):
            generate(view, **({"prompt": PROMPT} | request))
    for exit in (0, tiny.BLOCKS):
        with pytest.raises(UserError, match="The exit must lie between 1 and 3"):
            EarlyExit(view, exit)
    with pytest.raises(UserError, match="no exit 3; it was trained for 2"):
        M2R2(view, tiny.stream(), 3)
