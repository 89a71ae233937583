"""Rounds: every arm meets every prompt in turn, and the turn moves on."""

from collections import Counter

import pytest

from m2r2kit.bench.rounds import ratios, rounds


def test_the_order_of_the_arms_moves_on_and_the_first_round_is_not_kept():
    told, order = [], []

    def seconds(arm, number):
        order.append((arm, number))
        return 100 * number + ord(arm)

    checked = []
    taken = rounds("abc", 2, 3, seconds, lambda *pair: checked.append(pair), lambda: told.append(1))
    assert sorted(checked) == [(arm, number) for arm in "abc" for number in range(2)]
    assert len(told) == len(checked) + len(order) == 24
    assert [each.shape for each in taken] == [(3, 2)] * 3
    assert taken[1].tolist() == [[98, 198]] * 3
    turns = [[arm for arm, _ in order[i : i + 3]] for i in range(0, len(order), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert Counter(turn[0] for turn in turns) == {"a": 2, "b": 2, "c": 2}  # each is first as often


def test_several_seconds_of_a_text_are_kept_apart():
    (taken,) = rounds([None], 2, 1, lambda arm, number: (number, 5.0))
    assert taken.tolist() == [[[0, 5], [1, 5]]]


def test_ratios_are_paired():
    assert ratios([4.0, 9.0, 2.0], [2.0, 3.0, 2.0]) == pytest.approx({"median": 2, "min": 1, "max": 3})
