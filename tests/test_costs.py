"""The cost model, compared with the closed form, by hand and by simulation."""

import numpy as np
import pytest

from m2r2kit.bench.costs import best_drafts, even_acceptance, speedup, tau


@pytest.mark.parametrize("a", [0.0, 0.3, 0.875, 0.99])
@pytest.mark.parametrize("g", [0, 1, 4, 16])
def test_tau_is_the_closed_form(a, g):
    assert tau(a, g) == pytest.approx((1 - a ** (g + 1)) / (1 - a))


def test_tau_at_the_ends():
    assert tau(1.0, 7) == 8  # where the closed form divides by zero
    assert tau(0.0, 7) == 1
    assert tau(0.5, 0) == 1


@pytest.mark.parametrize("a, g", [(0.0, 3), (0.4, 1), (0.81, 8), (1.0, 5)])
def test_even_acceptance_undoes_tau(a, g):
    assert even_acceptance(tau(a, g), g) == pytest.approx(a, abs=1e-6)


def test_even_acceptance_of_a_mean_draft_length_lies_between_its_neighbours():
    assert even_acceptance(2.5, 4) < even_acceptance(2.5, 3.5) < even_acceptance(2.5, 3)


@pytest.mark.parametrize("tokens, g", [(1.5, 0), (0.9, 3), (4.1, 3)])
def test_no_acceptance_yields_such_tokens(tokens, g):
    with pytest.raises(ValueError):
        even_acceptance(tokens, g)


def test_tau_of_several_positions():
    assert tau([0.8, 0.5], 2) == pytest.approx(1 + 0.8 + 0.8 * 0.5)
    assert tau([0.8, 0.5], 1) == pytest.approx(1.8)  # positions beyond the draft do not count
    assert tau([0.8, 0.5], 3) == pytest.approx(1 + 0.8 + 0.4 + 0.2)  # the last one holds on
    assert tau([0.6] * 5, 5) == pytest.approx(tau(0.6, 5))
    assert tau([0.6, 0.0, 0.9], 3) == pytest.approx(1.6)


def test_tau_is_the_mean_of_what_chance_gives():
    a, g = 0.7, 4
    right = np.random.default_rng(0).random((200_000, g)) < a
    emitted = 1 + np.cumprod(right, axis=1).sum(axis=1)
    assert emitted.mean() == pytest.approx(tau(a, g), abs=0.01)


def test_speedup_by_hand():
    assert speedup(0.6, 0, 0.5) == 1  # no drafts: plain decoding
    assert speedup(1.0, 3, 0.0) == 4  # free and always right
    assert speedup(0.5, 1, 0.25, 1.5, 0.25) == pytest.approx(1.5 / 2)
    assert speedup([0.5], 1, 0.25, lambda rows: rows / 2) == pytest.approx(1.5 / 1.25)


def test_what_the_papers_figure_asks_for():
    """method.md: 2.8 on a chain needs a >= .875 at c = 1/8 and .974 at c = 1/4."""
    assert best_drafts(0.875, 1 / 8)[1] == pytest.approx(2.8, abs=0.01)
    assert best_drafts(0.974, 1 / 4)[1] == pytest.approx(2.8, abs=0.01)


def test_best_drafts():
    g, value = best_drafts(0.8, 0.125)
    assert value == speedup(0.8, g, 0.125)
    assert all(speedup(0.8, k, 0.125) <= value for k in range(17))
    assert best_drafts(0.2, 0.5) == (0, 1.0)  # does not pay
    assert best_drafts(1.0, 0.0, longest=5) == (5, 6.0)
    assert best_drafts(0.0, 0.0) == (0, 1.0)  # of equal ones the shortest
    # 0 drafts is plain decoding, whatever a verification costs
    assert best_drafts(0.9, 0.1, v=9.0) == (0, 1.0)


@pytest.mark.parametrize("a", [-0.1, 1.1, float("nan"), [], [0.5, 2.0]])
def test_acceptance_out_of_range(a):
    with pytest.raises(ValueError, match="between 0 and 1"):
        tau(a, 2)


def test_negative_drafts():
    with pytest.raises(ValueError, match="at least 0"):
        tau(0.5, -1)
