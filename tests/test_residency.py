"""Bookkeeping: each policy compared with a plain version of its rule, pins, counts, traces and replay."""

import itertools

import numpy as np
import pytest

from m2r2kit.common import UserError
from m2r2kit.experts import policies
from m2r2kit.experts import registry as methods
from m2r2kit.experts.predictors import Oracle, PreviousToken, Random, Recorded, Static
from m2r2kit.experts.residency import Residency
from m2r2kit.experts.simulate import replay
from m2r2kit.experts.trace import Pass, Trace, jaccard, sticky

TRACE = sticky(blocks=3, experts=12, top_k=3, passes=150, seed=1)


def memory(policy="lru", slots=6, trace=TRACE, shared=False):
    make = methods.policy(policy, trace)
    return Residency(trace.blocks, trace.experts, trace.top_k, slots, make, shared)


def misses(policy, slots=6, trace=TRACE, shared=False, predictor=None):
    return replay(trace, memory(policy, slots, trace, shared), predictor).missed


def accesses(trace, l):
    """Of one block: (number of the pass, expert)."""
    i = trace.blocks.index(l)
    return [(number, wanted) for number, p in enumerate(trace.passes, 1) for wanted in p.wanted[i]]


# --- policies -------------------------------------------------------------------------------


def plainly(trace, slots, rank):
    """Misses of a policy written as its rule says: `rank(history, pass, expert)`, the lowest goes."""
    missed = 0
    for l in trace.blocks:
        i, held, history = trace.blocks.index(l), set(), []
        for number, p in enumerate(trace.passes, 1):
            wanted = p.wanted[i]
            history += [(number, e) for e in wanted if e in held]
            for e in [e for e in wanted if e not in held]:
                missed += 1
                if len(held) == slots:
                    held.remove(
                        min((h for h in held if h not in wanted), key=lambda h: rank(history, number, h))
                    )
                held.add(e)
                history.append((number, e))
    return missed


def last_use(history, e):
    return max((i for i, (_, other) in enumerate(history) if other == e), default=-1)


def uses(history, e):
    return sum(other == e for _, other in history)


@pytest.mark.parametrize("slots", [3, 5, 9])
def test_lru_lfu_and_lfru_follow_their_rules(slots):
    trace = sticky(blocks=2, experts=12, top_k=3, passes=60, seed=2)
    rules = {
        "lru": lambda history, now, e: last_use(history, e),
        "lfu": lambda history, now, e: (uses(history, e), last_use(history, e)),
        "lfru": lambda history, now, e: (
            uses(history, e) / (1 + now - history[last_use(history, e)][0]),
            last_use(history, e),
        ),
    }
    for name, rule in rules.items():
        assert misses(name, slots, trace) == plainly(trace, slots, rule), name


@pytest.mark.parametrize("slots", [3, 5, 8])
@pytest.mark.parametrize("shared", [False, True])
def test_nobody_misses_less_often_than_belady(slots, shared):
    slots = slots * 3 if shared else slots
    best = misses("belady", slots, shared=shared)
    for name in set(methods.POLICIES) - {"belady"}:
        assert misses(name, slots, shared=shared) >= best, name
    assert misses("none", slots, shared=shared) == TRACE.accesses


def test_belady_is_the_best_there_is():
    """Against every way of evicting, on traces so short that all can be tried."""
    for seed in range(6):
        trace = sticky(blocks=1, experts=5, top_k=1, passes=9, stay=0, skew=0, seed=seed)
        order = [p.wanted[0][0] for p in trace.passes]

        def least(at, held, order=order):
            if at == len(order):
                return 0
            if order[at] in held:
                return least(at + 1, held)
            if len(held) < 3:
                return 1 + least(at + 1, held | {order[at]})
            return 1 + min(least(at + 1, held - {h} | {order[at]}) for h in held)

        assert misses("belady", 3, trace) == least(0, frozenset())


def test_clock_gives_a_second_chance():
    clock = policies.CLOCK(3)
    for key in (1, 2, 3):
        clock.add(key)
    clock.hit(1)
    assert clock.victim({}) == 2  # 1 was used
    clock.drop(2)
    clock.add(4)
    assert clock.victim({3}) in (1, 4) and clock.victim({1, 3, 4}) is None


def test_s3_fifo_keeps_what_was_used_again_and_lets_newcomers_go():
    pool = memory("s3-fifo", 4, Trace((0,), 12, 1))
    for expert in (1, 2, 1, 3, 4, 5, 6, 7):
        pool.begin()
        pool.arrive(0, [expert], ())
        pool.end()
    assert (0, 1) in pool.pools[0].held and (0, 2) not in pool.pools[0].held


def test_least_stale_evicts_behind_the_pass_before_ahead_of_it():
    policy = policies.LeastStale(6)
    for block in (0, 2, 4, 6):
        policy.add((block, 1))
    policy.now, policy.block = 1, 4
    assert policy.victim({}) == (0, 1)  # left behind and farthest
    assert policy.victim({(0, 1)}) == (2, 1)
    assert policy.victim({(0, 1), (2, 1)}) == (6, 1)  # ahead, farther than block 4
    policy.hit((6, 1))
    policy.hit((0, 1))
    assert policy.victim({(2, 1)}) == (4, 1)  # not touched in this pass
    assert policy.victim({(2, 1), (4, 1)}) == (0, 1)  # touched, but behind


def test_trace_guided_learns_from_the_text_most_like_this_one():
    tables = np.zeros((2, 2, 5))  # texts, blocks, experts
    tables[0, 0, [0, 1, 2]] = 9, 5, 1
    tables[1, 1, [0, 1, 2]] = 9, 5, 1
    policy = policies.TraceGuided(3, tables)
    for key in ((1, 0), (1, 1), (0, 0)):
        policy.add(key)
    policy.hit((1, 0))
    policy.begin()
    assert policy.victim({}) == (0, 0)  # of the other text
    assert policy.victim({(0, 0)}) == (1, 1)


# --- pins and counts ------------------------------------------------------------------------


@pytest.mark.parametrize("policy", methods.POLICIES)
@pytest.mark.parametrize("shared", [False, True])
def test_nothing_in_use_or_predicted_is_evicted_and_no_slot_has_two_owners(policy, shared):
    slots = 12 if shared else 4
    residency = memory(policy, slots, shared=shared)
    guess = Random(TRACE.blocks, 2, TRACE.experts, 4)
    owner = {}  # what whoever carries out the reads in their order finds in (pool, slot)

    def carry_out(loads):
        for key, slot, evicted in loads:
            pool = residency.pools.index(residency.pool_of[key[0]])
            if evicted is not None:
                assert owner[pool, slot] == evicted
            owner[pool, slot] = key

    for number, p in enumerate(TRACE.passes):
        residency.begin()
        for m, experts in guess.before(number):
            carry_out(residency.speculate(m, experts))
        for l, wanted in zip(TRACE.blocks, p.wanted):
            pinned = {k for pool in residency.pools for k in pool.pinned if k[0] != l}
            if residency.running:  # that block is through
                block, experts = residency.running
                pinned -= {(block, e) for e in experts}
            named = [(l, [number % TRACE.experts, 1]), *guess.at(number, l, wanted)]
            loads = residency.arrive(l, wanted, named)
            carry_out(itertools.chain(*loads))
            held = {k: s for pool in residency.pools for k, s in pool.held.items()}
            assert all((l, e) in held for e in wanted)
            assert not any(load.evicted in pinned for load in itertools.chain(*loads))
            for i, pool in enumerate(residency.pools):
                assert all(owner[i, slot] == key for key, slot in pool.held.items())
                assert len(set(pool.held.values())) == len(pool.held) <= slots
        residency.end()
        assert not any(pool.pinned for pool in residency.pools)


def test_each_access_is_counted_once_and_reads_add_up():
    for predictor in (None, Random(TRACE.blocks, 1, TRACE.experts, 3), PreviousToken(TRACE.blocks, 2)):
        residency = memory(slots=4)
        counts = replay(TRACE, residency, predictor)
        assert counts.accesses == TRACE.accesses
        still = sum(len(pool.unused) for pool in residency.pools)
        assert counts.speculated == counts.ahead + counts.unused + still


def test_an_oracle_is_right_always_and_leaves_no_miss_where_there_is_room():
    counts = replay(TRACE, memory(slots=6), Oracle(TRACE, 1))
    assert counts.recall == 1 and counts.missed == 0 and counts.unused == 0
    assert replay(TRACE, memory("none", 6), Oracle(TRACE, 2)).ahead == TRACE.accesses


def test_what_is_named_and_here_does_not_go_for_what_is_named_and_missing():
    pool = memory(slots=3, trace=Trace((0, 1), 12, 2))
    pool.begin()
    for expert in (1, 2, 3):  # 1 is the oldest
        pool.demand(0, [expert])
        pool.release(0, [expert])
    assert [(load.key, load.evicted) for load in pool.speculate(0, [9, 1, 9])] == [((0, 9), (0, 2))]
    assert pool.counts.speculated == 1 and not pool.demand(0, [9, 1])


def test_random_guesses_are_right_as_often_as_chance():
    long = sticky(blocks=2, experts=12, top_k=3, passes=2000, seed=5)
    counts = replay(long, memory(trace=long), Random(long.blocks, 1, 12, 3))
    assert counts.recall == pytest.approx(3 / 12, abs=0.02)


def test_popular_experts_and_those_of_the_token_before_are_better_than_chance():
    for predictor in (Static(TRACE, 1, 3), PreviousToken(TRACE.blocks, 1)):
        assert replay(TRACE, memory(), predictor).recall > 0.4


def test_too_few_slots_for_a_token_are_one_sentence():
    with pytest.raises(UserError, match="3 experts run for each token"):
        memory(slots=2)


def test_a_prompt_needs_each_expert_once_whatever_fits():
    residency = memory(slots=4)
    residency.begin()
    residency.demand(0, [7, 9])
    residency.release(0, [7, 9])
    groups = []
    for group in residency.groups(0, list(range(10)) * 2):
        groups.append(group)
        residency.demand(0, group)
        residency.release(0, group)
    assert groups[0][:2] == [7, 9]  # those in memory first, before they could be evicted
    assert sorted(itertools.chain(*groups)) == list(range(10)) and max(map(len, groups)) == 4
    assert residency.counts.missed == 2 + 8


# --- traces ---------------------------------------------------------------------------------


def test_a_trace_survives_its_file(tmp_path):
    trace = Trace((0, 2), 8, 2)
    trace.passes.append(Pass(0, True, [[1, 2, 3], [4]], [[], [], []]))
    trace.passes.append(Pass(0, False, [[1, 2], [4, 5]], [[(0, [1])], [(2, [5, 4])], []]))
    trace.passes.append(Pass(1, False, [[3, 2], [7, 5]], [[], [(0, [1]), (2, [])], []]))
    trace.save(tmp_path / "t.npz")
    assert Trace.load(tmp_path / "t.npz") == trace
    assert [f.name for f in tmp_path.iterdir()] == ["t.npz"]


def test_a_damaged_trace_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no trace"):
        Trace.load(tmp_path / "none.npz")
    TRACE.save(tmp_path / "t.npz")
    content = (tmp_path / "t.npz").read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"text"):
        (tmp_path / "t.npz").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged or not a trace"):
            Trace.load(tmp_path / "t.npz")


def test_the_trace_of_another_model_is_one_sentence(tmp_path):
    TRACE.save(tmp_path / "t.npz")
    assert Trace.load(tmp_path / "t.npz", TRACE) == TRACE
    for other in (Trace((0, 1), 12, 3), Trace(TRACE.blocks, 16, 3), Trace(TRACE.blocks, 12, 2)):
        with pytest.raises(UserError, match="trace of another model"):
            Trace.load(tmp_path / "t.npz", other)


def test_a_trace_that_cannot_be_written_leaves_what_was_there(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        TRACE.save(tmp_path / "folder")
    TRACE.save(tmp_path / "without-a-suffix")
    assert Trace.load(tmp_path / "without-a-suffix") == TRACE
    assert sorted(f.name for f in tmp_path.iterdir()) == ["folder", "without-a-suffix"]


def test_sticky_traces_stay_as_long_as_they_are_told():
    for stay, least, most in ((0.0, 0.0, 0.35), (0.9, 0.7, 0.95)):
        trace = sticky(blocks=1, experts=32, top_k=4, passes=500, stay=stay, skew=0.5, seed=3)
        pairs = itertools.pairwise(p.wanted[0] for p in trace.passes)
        assert least <= np.mean([jaccard(a, b) for a, b in pairs]) <= most


def test_what_was_named_can_be_replayed():
    trace = Trace(TRACE.blocks, TRACE.experts, TRACE.top_k)
    guess = Random(TRACE.blocks, 2, TRACE.experts, 3)
    for number, p in enumerate(TRACE.passes):
        at = [guess.at(number, l, w) for l, w in zip(TRACE.blocks, p.wanted)]
        trace.passes.append(Pass(0, False, p.wanted, [guess.before(number), *at]))
    one = replay(TRACE, memory(slots=4), Random(TRACE.blocks, 2, TRACE.experts, 3))
    assert replay(trace, memory(slots=4), Recorded(trace)) == one and one.ahead > 0
