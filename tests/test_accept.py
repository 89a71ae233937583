"""Sampling is lossless: with any drafter, the tokens have the model's own distribution.

The exact joint distribution of three tokens is enumerated with formulas written again here,
and compared with samples of the kit's rule (chi-square). Rules broken on purpose must fail.
"""

from bisect import bisect_right
from functools import cache
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from m2r2kit.common import UserError
from m2r2kit.speculation import M2R2, EarlyExit, Sampler, generate
from m2r2kit.speculation import decode as loop
from m2r2kit.speculation.accept import accept_greedy, accept_sampled

V = 5  # tokens of the tables
SAMPLES = 200_000
SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 4, "top_p": 0.9},
    {"temperature": 0.5, "top_p": 0.85, "min_p": 0.1},
]


# --- exact distributions ------------------------------------------------------------------


def chances(logits, temperature, top_k=0, top_p=1.0, min_p=0.0) -> list[float]:
    """Reference implementation of top-p, min-p, top-k and temperature for one row."""
    p = [float(np.exp(x)) for x in logits]
    p = [x / sum(p) for x in p]
    order, kept, mass = sorted(range(len(p)), key=lambda i: -p[i]), [], 0.0
    for i in order:
        if mass < top_p:
            kept.append(i)
            mass += p[i]
    kept = [i for i in kept if p[i] >= min_p * p[order[0]]][: top_k or None]
    weights = [float(np.exp(x / temperature)) if i in kept else 0.0 for i, x in enumerate(logits)]
    return [w / sum(weights) for w in weights]


def joint(rows, vocabulary: int, **settings) -> np.ndarray:
    """Exact probabilities of three tokens, (V, V, V); `rows(prefix)` are the logits after a prefix."""
    exact = np.zeros((vocabulary,) * 3)
    for a, b in product(range(vocabulary), repeat=2):
        first = chances(rows(()), **settings)[a]
        second = chances(rows((a,)), **settings)[b] if first else 0.0
        if first * second:
            exact[a, b] = first * second * np.array(chances(rows((a, b)), **settings))
    assert abs(exact.sum() - 1) < 1e-9
    return exact


def check_counts(counts: np.ndarray, exact: np.ndarray):
    """Chi-square test that counts come from `exact`, at p = 0.0001."""
    assert counts[exact == 0].sum() == 0, "a token that cannot be drawn was drawn"
    seen, expected = counts[exact > 0].astype(float), exact[exact > 0] * counts.sum()
    rare = expected < 5
    if rare.any():
        seen = np.append(seen[~rare], seen[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    freedom = len(expected) - 1
    # Wilson and Hilferty: the cube root of chi-square / freedom is nearly normal
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    chi_square = ((seen - expected) ** 2 / expected).sum()
    assert chi_square < limit, f"chi-square {chi_square:.0f} with {freedom} degrees of freedom"


# --- what may be drawn ---------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 10])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 1.0])
def test_the_distribution_is_mlx_lms(temperature, top_p, top_k, min_p):
    random = np.random.default_rng(3)
    logits = mx.array(2 * random.standard_normal((8, 32)).astype(np.float32))
    ours = Sampler(temperature, top_k, top_p, min_p=min_p).probabilities(logits)
    theirs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for asked, rule in ((top_p < 1, lambda x: apply_top_p(x, top_p)),
                        (min_p > 0, lambda x: apply_min_p(x, min_p)),
                        (top_k > 0, lambda x: apply_top_k(x, top_k))):  # fmt: skip
        theirs = rule(theirs) if asked else theirs
    theirs = np.array(mx.softmax(theirs / temperature, axis=-1))
    assert np.array_equal(ours > 0, theirs > 0) and np.allclose(ours, theirs, atol=1e-5)


def test_the_mlx_lm_arm_draws_from_the_same_distribution():
    sampler = Sampler(0.5, top_p=0.75, min_p=0.02, top_k=4)
    logits = mx.array([[2.0, 1.5, 1.4, 0.3, -0.5, -2.0]])
    p, draw = sampler.probabilities(logits)[0], sampler.of_mlx_lm(6)
    rows = mx.broadcast_to(logits - mx.logsumexp(logits), (20_000, 6))
    counts = np.bincount(np.array(draw(rows)), minlength=6)
    check_counts(counts, p)
    with pytest.raises(AssertionError):  # the temperature first is another distribution
        before = Sampler(1.0, top_p=0.75, min_p=0.02, top_k=4).probabilities(logits / 0.5)[0]
        check_counts(counts, before)
    assert Sampler().of_mlx_lm(6) is None


def test_more_than_all_tokens_are_all_tokens():
    logits = mx.array([[1.0, 0.0, 2.0]])
    assert np.allclose(Sampler(1.0, 100_000).probabilities(logits), mx.softmax(logits))
    assert Sampler(1.0, 100_000, seed=2**64).of_mlx_lm(3)(logits).item() in range(3)


@pytest.mark.parametrize("temperature", [1e-310, 1e-40, 1e-20])
def test_a_tiny_temperature_draws_the_likeliest(temperature):
    logits, sampler = mx.array([[1.0, 3.0, 2.9, -mx.inf]]), Sampler(temperature)
    assert sampler.probabilities(logits).tolist() == [[0, 1, 0, 0]]
    assert sampler.choose(logits[0]) == 1 and sampler.of_mlx_lm(4)(logits).item() == 1


def test_logits_that_are_no_numbers_are_an_error_and_no_token():
    for wrong in (mx.nan, mx.inf):
        with pytest.raises(UserError, match="not finite"):
            Sampler(1.0).choose(mx.array([0.0, wrong, 1.0]))
    with pytest.raises(UserError, match="not finite"):
        Sampler(1.0).choose(mx.array([-mx.inf, -mx.inf]))


def test_no_draw_falls_behind_the_last_token():
    sampler = Sampler(1.0)

    class Highest:
        def random(self):
            return 1 - 2**-53

    sampler.random = Highest()
    for seed in range(200):
        p = np.random.default_rng(seed).random(50)
        p[-3:] = 0
        assert sampler.draw(p / p.sum()) == 46


# --- the rule, on tables ------------------------------------------------------------------


@cache
def tables(seed: int) -> dict:
    """Random logits (V,) after each prefix of 0, 1 and 2 tokens."""
    random = np.random.default_rng(seed)
    prefixes = [(), *product(range(V)), *product(range(V), repeat=2)]
    return {prefix: random.standard_normal(V) * 1.5 for prefix in prefixes}


def probabilities(seed: int, sampler: Sampler) -> dict:
    """The kit's probabilities of each table."""
    prefixes = list(tables(seed))
    rows = sampler.probabilities(mx.array(np.stack([tables(seed)[x] for x in prefixes])))
    return dict(zip(prefixes, rows, strict=True))


def sample_tables(samples: int, rule=accept_sampled, q_of_rule=None, **settings) -> np.ndarray:
    """Draw three tokens many times, as the loop does: draft from q, accept by the rule, go on where
    it stopped. `q_of_rule` are settings for a q that the rule is told though others were drawn from."""
    sampler = Sampler(seed=7, **settings)
    p, q = probabilities(1, sampler), probabilities(2, sampler)
    edges = {prefix: np.cumsum(row).tolist() for prefix, row in q.items()}
    told = probabilities(2, Sampler(**q_of_rule)) if q_of_rule else q
    counts = np.zeros((V,) * 3, dtype=int)
    for _ in range(samples):
        text = ()
        while len(text) < 3:
            drafted = text
            k = 2 - len(text)
            for _ in range(k):
                number = sampler.random.random() * edges[drafted][-1]
                drafted = (*drafted, bisect_right(edges[drafted], number))
            prefixes = [drafted[: len(text) + i] for i in range(k + 1)]
            new = drafted[len(text) :]
            text += tuple(rule(list(new), [told[x] for x in prefixes[:k]], [p[x] for x in prefixes], sampler))
        counts[text] += 1
    return counts


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_accepted_tokens_have_the_model_s_distribution(settings):
    exact = joint(lambda prefix: tables(1)[prefix], V, **settings)
    samples = SAMPLES if settings is SETTINGS[-1] else SAMPLES // 10
    check_counts(sample_tables(samples, **settings), exact)


# --- siblings: broken on purpose, and caught ----------------------------------------------


def no_residual(drafts, q, p, sampler):
    """Draws the replacement from p in place of max(p - q, 0)."""
    for i, token in enumerate(drafts):
        if sampler.random.random() * q[i][token] >= p[i][token]:
            return [*drafts[:i], sampler.draw(p[i])]
    return [*drafts, sampler.draw(p[len(drafts)])]


def always_accept(drafts, q, p, sampler):
    return [*drafts, sampler.draw(p[len(drafts)])]


def stale_row(drafts, q, p, sampler):
    """Takes the extra token from the row before."""
    return accept_sampled(drafts, q, [*p[:-1], p[max(len(p) - 2, 0)]], sampler)


BROKEN = [no_residual, always_accept, stale_row]


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_a_broken_rule_is_caught(rule):
    exact = joint(lambda prefix: tables(1)[prefix], V, temperature=1.0)
    check_counts(sample_tables(10_000, temperature=1.0), exact)
    with pytest.raises(AssertionError, match="chi-square"):
        check_counts(sample_tables(10_000, rule, temperature=1.0), exact)


def test_q_taken_before_top_k_is_caught():
    settings = {"temperature": 1.0, "top_k": 3}
    exact = joint(lambda prefix: tables(1)[prefix], V, **settings)
    check_counts(sample_tables(10_000, **settings), exact)
    with pytest.raises(AssertionError, match="chi-square"):
        check_counts(sample_tables(10_000, q_of_rule={"temperature": 1.0}, **settings), exact)


def test_a_residual_that_is_not_renormalised_is_caught(monkeypatch):
    def draw(self, p):
        return min(int(np.searchsorted(np.cumsum(p), self.random.random(), side="right")), V - 1)

    monkeypatch.setattr(Sampler, "draw", draw)
    with pytest.raises(AssertionError):
        check_counts(
            sample_tables(10_000, temperature=1.0), joint(lambda x: tables(1)[x], V, temperature=1.0)
        )


def test_the_p_of_another_temperature_is_caught():
    with pytest.raises(AssertionError, match="chi-square"):
        check_counts(
            sample_tables(10_000, temperature=1.0), joint(lambda x: tables(1)[x], V, temperature=1.1)
        )


# --- the rule, in the loop ----------------------------------------------------------------

LETTERS = 3
FEW = {"vocab_size": LETTERS, "num_hidden_layers": 2}


def sample_model(samples: int, drafter, **settings) -> np.ndarray:
    view, sampler = tiny.backbone("llama", **FEW), Sampler(seed=11, **settings)
    counts = np.zeros((LETTERS,) * 3, dtype=int)
    for _ in range(samples):
        counts[tuple(generate(view, [1], drafter, 2, 3, sampler).tokens)] += 1
    return counts


def model_joint(**settings) -> np.ndarray:
    view = tiny.backbone("llama", **FEW)
    prefixes = [(), *product(range(LETTERS)), *product(range(LETTERS), repeat=2)]
    rows = {x: np.array(view.model(mx.array([[1, *x]]))[0, -1]) for x in prefixes}
    return joint(rows.__getitem__, LETTERS, **settings)


@pytest.mark.parametrize("settings", [{"temperature": 2.0}, {"temperature": 3.0, "top_k": 2}], ids=str)
def test_generation_has_the_model_s_distribution(settings):
    drafter = EarlyExit(tiny.backbone("llama", **FEW), 1)
    check_counts(sample_model(200, drafter, **settings), model_joint(**settings))


def test_a_loop_that_always_accepts_is_caught(monkeypatch):
    monkeypatch.setattr(loop, "accept_sampled", always_accept)
    with pytest.raises(AssertionError):
        check_counts(
            sample_model(150, EarlyExit(tiny.backbone("llama", **FEW), 1), temperature=2.0),
            model_joint(temperature=2.0),
        )


def test_top_k_1_is_greedy():
    view, prompt = tiny.backbone(), tiny.prompt(6)
    wanted = generate(view, prompt, max_tokens=10).tokens
    for drafter in (None, EarlyExit(view, 2), M2R2(view, tiny.stream())):
        for settings in ({"top_k": 1}, {"top_p": 1e-9}):
            found = generate(view, prompt, drafter, 3, 10, Sampler(1.5, seed=5, **settings))
            assert found.tokens == wanted


def test_the_seed_decides():
    view, prompt = tiny.backbone(), tiny.prompt(6)
    for drafter in (None, EarlyExit(view, 2)):
        runs = [generate(view, prompt, drafter, 3, 10, Sampler(3.0, seed=s)).tokens for s in (1, 1, 2)]
        assert runs[0] == runs[1] != runs[2]


# --- probabilities ------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_probabilities_are_those_of_the_plain_formulas(settings):
    rows = np.random.default_rng(0).standard_normal((20, V)).astype(np.float32) * 2
    found = Sampler(**settings).probabilities(mx.array(rows))
    for row, p in zip(rows, found, strict=True):
        assert np.allclose(p, chances(row, **settings), atol=1e-12)
        assert (p == 0).tolist() == [x == 0 for x in chances(row, **settings)]


def test_of_equal_tokens_the_first_are_kept_as_argmax_does():
    rows = mx.array([[1.0, 2, 2, 0, 2], [0, 0, 0, 0, 0]])
    for k in range(1, V):
        p = Sampler(1.0, top_k=k).probabilities(rows)
        assert (p > 0).sum(-1).tolist() == [k, k]
    assert Sampler(1.0, top_k=1).probabilities(rows).argmax(-1).tolist() == mx.argmax(rows, -1).tolist()
    assert (Sampler(1.0, top_k=99).probabilities(rows) > 0).all()
    assert Sampler(1.0, top_p=1e-9).probabilities(rows).tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]


def test_large_logits_and_half_precision_do_not_overflow():
    rows = mx.array([[3e4, 2e4, -3e4]])
    for x in (rows, rows.astype(mx.float16), rows.astype(mx.bfloat16)):
        assert Sampler(0.01).probabilities(x).tolist() == [[1, 0, 0]]


def test_a_token_without_probability_is_never_drawn():
    class Numbers:
        def __init__(self, number):
            self.number = number

        def random(self):
            return self.number

    sampler = Sampler(1.0)
    p = np.array([0, 0.3, 0, 0.2, 0.1, 0])  # need not sum to 1
    drawn = []
    for number in (0.0, 0.49999, 0.5, 0.8, 0.9999, np.nextafter(1.0, 0.0)):
        sampler.random = Numbers(number)
        drawn.append(sampler.draw(p))
    assert drawn == [1, 1, 3, 3, 4, 4]


# --- the edges of the rule ----------------------------------------------------------------


def test_equal_distributions_accept_every_draft():
    sampler, p = Sampler(1.0), np.full((4, V), 1 / V)
    for _ in range(200):
        assert accept_sampled([3, 0, 2], list(p[:3]), p, sampler)[:3] == [3, 0, 2]


def test_a_draft_that_the_model_excludes_is_never_accepted():
    sampler, q, p = Sampler(1.0), np.array([1.0, 0, 0]), np.array([[0, 0.5, 0.5]] * 2)
    found = [accept_sampled([0], [q], p, sampler) for _ in range(200)]
    assert {tuple(x) for x in found} == {(1,), (2,)}


def test_a_rejection_without_a_residual_falls_back_to_the_model():
    """Rounding can leave q a little above p everywhere; there is then nothing in max(p - q, 0)."""
    sampler, p = Sampler(1.0), np.array([[0.0, 1.0]] * 2)
    q = np.array([1e-17, 1.0])  # p[0] is 0, so token 0 is rejected
    assert accept_sampled([0], [q], p, sampler) == [1]


def test_greedy_takes_the_longest_right_prefix_and_one_more():
    assert accept_greedy([], [4]) == [4]
    assert accept_greedy([1, 2, 3], [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert accept_greedy([1, 2, 3], [1, 9, 3, 4]) == [1, 9]
    assert accept_greedy([1, 2, 3], [9, 2, 3, 4]) == [9]


def test_bad_settings_are_refused():
    nan, infinite = float("nan"), float("inf")
    for settings in (
        {"temperature": -0.1}, {"temperature": nan}, {"temperature": infinite}, {"top_k": -1}, {"seed": -1},
        {"top_p": 0}, {"top_p": 1.1}, {"top_p": nan},
    ):  # fmt: skip
        with pytest.raises(UserError):
            Sampler(**settings)
    assert Sampler(0).greedy and not Sampler(0.1).greedy
