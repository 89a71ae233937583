"""The simulated clock: counts of the replay, times that can be worked out by hand, and the bound."""

import pytest

from m2r2kit.experts import registry as methods
from m2r2kit.experts.predictors import Oracle, Predictor, PreviousToken, Random
from m2r2kit.experts.residency import Residency
from m2r2kit.experts.simulate import Clock, replay
from m2r2kit.experts.trace import Pass, Trace, distances, sticky

TRACE = sticky(blocks=4, experts=12, top_k=3, passes=40, stay=0.4, seed=3)
COMPUTE = [1.0] * 5


def memory(policy="lru", slots=6, trace=TRACE):
    return Residency(trace.blocks, trace.experts, trace.top_k, slots, methods.policy(policy))


def passed(read, predictor=None, policy="lru", slots=6, trace=TRACE):
    return Clock(memory(policy, slots, trace), predictor, COMPUTE[: len(trace.blocks) + 1], read).run(trace)


@pytest.mark.parametrize("read", [0.001, 0.3, 5.0])
@pytest.mark.parametrize("who", ["nothing", "previous", "random", "oracle"])
def test_it_counts_what_the_replay_counts_whatever_the_disk(who, read):
    make = {
        "nothing": Predictor,
        "previous": lambda: PreviousToken(TRACE.blocks, 2),
        "random": lambda: Random(TRACE.blocks, 2, 12, 3),
        "oracle": lambda: Oracle(TRACE, 2),
    }[who]
    out = passed(read, make())
    assert out.counts == replay(TRACE, memory(), make())
    assert out.in_time + out.late == out.counts.ahead
    kinds = [e.kind for token in out.tokens for e in token]
    assert kinds.count("demand") == out.counts.missed and kinds.count("ahead") == out.counts.ahead


def test_on_demand_computing_and_reading_add_up():
    out = passed(0.5, policy="none")
    assert out.seconds == pytest.approx(40 * (5 + 4 * 3 * 0.5)) and out.stall_seconds == pytest.approx(240)


def test_one_read_ahead_hides_behind_one_block():
    trace = Trace((0, 1), 4, 1, [Pass(0, False, [[0], [1]], [[], [], []])])
    assert passed(0.6, Oracle(trace, 1), trace=trace, slots=1).seconds == pytest.approx(3 + 0)  # asked at 0
    slow = passed(1.5, Oracle(trace, 1), trace=trace, slots=1)
    # block 0's is there at 1.5; block 1's was asked for at 1, begins at 1.5 and is there at 3
    assert slow.seconds == pytest.approx(4.0) and slow.late == 2


def test_what_is_needed_now_overtakes_what_may_be():
    class Wrong(Predictor):
        def before(self, number):
            return [(1, [2, 3])]

    trace = Trace((0, 1), 4, 1, [Pass(0, False, [[0], [1]], [[], [], []])])
    out = passed(1.0, Wrong(), trace=trace, slots=3)
    (demand, _) = [e for e in out.tokens[0] if e.kind == "demand"]
    assert (demand.start, demand.end) == (1.0, 2.0)  # behind the one that was on its way, before the other


def test_what_was_named_wrongly_is_parked_until_it_is_named_again():
    class Twice(Predictor):
        def before(self, number):
            return [(0, [2, 3]), (1, [1])]

    passes = [Pass(0, False, [[0], [1]], [[], [], []]) for _ in range(2)]
    out = passed(0.9, Twice(), trace=Trace((0, 1), 5, 1, passes), slots=4)
    # of block 0's two one is read at once, the other has begun when block 0 chooses: 0 at 1.8, 1 at 2.7
    (ahead,) = [e for e in out.tokens[0] if e.kind == "ahead"]
    assert (ahead.block, ahead.start) == (1, pytest.approx(2.7))
    slow = passed(3.0, Twice(), trace=Trace((0, 1), 5, 1, passes), slots=4)
    (demand,) = [e for e in slow.tokens[0] if e.kind == "demand"]
    (ahead,) = [e for e in slow.tokens[0] if e.kind == "ahead"]
    assert (demand.start, ahead.start) == (3.0, 6.0)  # 3 was parked, and does not stand before them


def test_where_all_fit_the_filling_is_no_reading_of_tokens():
    out = passed(1.0, slots=12)
    assert out.counts.reads == 0 and out.seconds == pytest.approx(40 * 5)


@pytest.mark.parametrize("x", [0.1, 0.5, 1.0, 2.0, 10.0])
def test_no_overlap_gains_more_than_the_bound_and_an_oracle_loses_nothing(x):
    lru = passed(1e-9)
    read = 5.0 * x * len(lru.tokens) / lru.counts.reads
    gain = passed(read).seconds / passed(read, Oracle(TRACE, 2)).seconds
    assert 1 <= gain + 1e-6 and gain <= (1 + x) / max(1, x) + 1e-6


def test_a_prompt_fills_the_memory_and_takes_no_time():
    trace = Trace((0,), 4, 1, [Pass(0, True, [[0, 1]], [[], []]), Pass(0, False, [[1]], [[], []])])
    out = passed(5.0, trace=trace, slots=2)
    assert out.seconds == 2.0 and out.counts.resident == out.counts.accesses == 1


def test_distances_are_the_others_that_ran_in_between():
    passes = [Pass(0, False, [[e]], [[], []]) for e in (0, 1, 2, 0, 0, 1)]
    assert distances(Trace((0,), 4, 1, passes)) == [2, 0, 2]
