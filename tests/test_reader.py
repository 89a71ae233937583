"""The reader: right bytes in the right place, what is needed first, and no error that is swallowed."""

import errno
import os
import shutil
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import tiny_experts

from m2r2kit.common import UserError
from m2r2kit.experts import reader as reading
from m2r2kit.experts.reader import AHEAD, PARKED, Link, Reader, system_read_bytes
from m2r2kit.experts.store import Store


@pytest.fixture(scope="module")
def mode():
    """`direct` where the tests' disk can be read past the page cache."""
    store = tiny_experts.store()
    try:
        with Reader(store) as r:
            r.wait([r.submit(0, 0, lambda record: None, True)])
        return "direct"
    except UserError:
        return "buffered"


def copied(tmp_path) -> Store:
    shutil.copytree(tiny_experts.store().folder, tmp_path / "store")
    return Store(tmp_path / "store")


class Landed(dict):
    def at(self, block, expert):
        def land(record):
            self[block, expert] = record.tobytes()

        return land


@contextmanager
def busy(threads: int = 1, urgent: bool = False):
    """A reader of which one thread is held by its first record: (reader, that request, what lets it go). It
    goes in any case at the end, or a test that fails would wait for ever."""
    gate, started = threading.Event(), threading.Event()
    with Reader(tiny_experts.store(), "buffered", threads) as r:
        try:
            first = r.submit(0, 0, lambda record: (started.set(), gate.wait()), urgent)
            started.wait()
            yield r, first, gate.set
        finally:
            gate.set()


def test_every_record_lands_as_it_was_packed(mode):
    store, landed = tiny_experts.store(), Landed()
    size = store.manifest.record_bytes
    with Reader(store, mode, threads=3) as r:
        all_of_them = [(l, e) for l in store.manifest.blocks for e in range(store.manifest.experts)]
        r.wait([r.submit(l, e, landed.at(l, e), e % 2 == 0) for l, e in all_of_them])
        assert r.reads == len(all_of_them) and r.bytes_read == size * len(all_of_them)
    for l, e in all_of_them:
        assert landed[l, e] == store.path(l).read_bytes()[e * size : (e + 1) * size]


def test_what_is_needed_now_overtakes_what_may_be_needed_later():
    order = []

    def note(name):
        return lambda record: order.append(name)

    with busy() as (r, first, let_go):
        later = [r.submit(0, e, note(f"later {e}"), False) for e in (1, 2, 3)]
        now = r.submit(1, 0, note("now"), True)
        let_go()
        r.wait([now])
        r.wait([first, *later])
    assert order[0] == "now" and set(order[1:]) == {"later 1", "later 2", "later 3"}


def test_one_asked_for_ahead_and_needed_now_goes_first():
    order = []
    with busy() as (r, first, let_go):
        later = [r.submit(0, e, lambda record, e=e: order.append(e), False) for e in (1, 2, 3)]
        waiter = threading.Thread(target=r.wait, args=([later[2]],))
        waiter.start()
        for _ in range(2000):  # until it has been moved to the front
            if r._queues[0]:
                break
            time.sleep(0.001)
        let_go()
        waiter.join()
        r.wait([first, *later])
    assert order == [3, 1, 2]


def test_what_is_parked_is_not_read_until_it_is_wanted_again():
    landed = Landed()
    with busy(urgent=True) as (r, first, let_go):
        queued = [r.submit(0, e, landed.at(0, e), False) for e in (1, 2, 3, 4)]
        r.rank(queued[:3], PARKED)
        r.rank(queued[:1], AHEAD)
        let_go()
        r.wait([first, queued[3]])
        r.wait([queued[0]])
        assert set(landed) == {(0, 1), (0, 4)} and r.reads == 3
        r.wait([queued[1]])  # needed after all
        assert set(landed) == {(0, 1), (0, 2), (0, 4)}
        r.rank(queued, PARKED)  # what is there stays there
        assert queued[1].done and not queued[2].done


def test_one_thread_of_several_waits_for_what_is_needed_now():
    landed = Landed()
    with busy(threads=2) as (r, first, let_go):
        second = r.submit(0, 1, landed.at(0, 1), False)
        r.wait([r.submit(0, 2, landed.at(0, 2), True)])  # while all that reads ahead is busy
        assert set(landed) == {(0, 2)} and not second.done
        let_go()
        r.wait([first, second])
    assert set(landed) == {(0, 1), (0, 2)}


def test_what_was_cancelled_does_not_land():
    landed = Landed()
    with busy(urgent=True) as (r, first, let_go):
        queued = r.submit(0, 1, landed.at(0, 1), False)
        r.cancel(queued)
        let_go()
        last = r.submit(0, 2, landed.at(0, 2), False)
        r.wait([first, last])
        assert r.reads == 2
    assert set(landed) == {(0, 2)}


# --- faults ---------------------------------------------------------------------------------


class Failing:
    """`os.preadv`, which fails for one expert as often as it is told."""

    def __init__(self, monkeypatch, expert: int, times: int, how):
        self.left, self.real = times, os.preadv
        size = tiny_experts.store().manifest.record_bytes

        def preadv(file, buffers, offset):
            if offset // size == expert and self.left:
                self.left -= 1
                return how(file, buffers, offset)
            return self.real(file, buffers, offset)

        monkeypatch.setattr(reading.os, "preadv", preadv)


def broken(*_):
    raise OSError(errno.EIO, "Input/output error")


def test_a_read_that_fails_once_is_tried_again(monkeypatch):
    Failing(monkeypatch, expert=3, times=1, how=broken)
    landed = Landed()
    with Reader(tiny_experts.store(), "buffered") as r:
        r.wait([r.submit(1, 3, landed.at(1, 3), True)])
        assert r.retries == 1 and len(landed) == 1


@pytest.mark.parametrize(
    "how, reason", [(broken, "Input/output error"), (lambda *_: 0, "the file ends too early")]
)
def test_a_read_that_fails_twice_names_the_record(monkeypatch, how, reason):
    Failing(monkeypatch, expert=3, times=2, how=how)
    landed = Landed()
    with Reader(tiny_experts.store(), "buffered") as r:
        others = [r.submit(1, e, landed.at(1, e), True) for e in (0, 5)]
        with pytest.raises(UserError, match=f"Expert 3 of block 1 cannot be read .*{reason}"):
            r.wait([r.submit(1, 3, landed.at(1, 3), True), *others])
        r.wait(others)  # the others are not harmed
    assert set(landed) == {(1, 0), (1, 5)}


def test_a_short_read_goes_on_where_it_stopped(monkeypatch):
    real = os.preadv
    monkeypatch.setattr(reading.os, "preadv", lambda f, b, o: real(f, [b[0][:1000]], o))
    landed = Landed()
    with Reader(tiny_experts.store(), "buffered") as r:
        r.wait([r.submit(2, 1, landed.at(2, 1), True)])
    size = r.size
    assert landed[2, 1] == r.store.path(2).read_bytes()[size : 2 * size]


def test_a_file_cut_short_after_it_was_opened(tmp_path, mode):
    store = copied(tmp_path)
    with Reader(store, mode) as r:
        os.truncate(store.path(1), store.manifest.record_bytes)
        with pytest.raises(UserError, match=r"Expert 2 of block 1 .*ends too early"):
            r.wait([r.submit(1, 2, lambda record: None, True)])


def test_a_flipped_byte_does_not_land(tmp_path, mode):
    store, landed = copied(tmp_path), Landed()
    size = store.manifest.record_bytes
    with store.path(2).open("r+b") as file:
        file.seek(4 * size + 9)
        byte = file.read(1)[0]
        file.seek(4 * size + 9)
        file.write(bytes([byte ^ 16]))
    with Reader(store, mode) as r:
        with pytest.raises(UserError, match=r"Expert 4 of block 2 .*checksum is wrong"):
            r.wait([r.submit(2, 4, landed.at(2, 4), True)])
        r.wait([r.submit(2, 5, landed.at(2, 5), True)])
    assert set(landed) == {(2, 5)}


def test_a_disk_that_cannot_be_read_past_the_page_cache_is_one_sentence(monkeypatch):
    def refuse(path, flags):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(reading.os, "open", refuse)
    with pytest.raises(UserError, match="--reads buffered"):
        Reader(tiny_experts.store(), "direct")


def test_a_record_that_cannot_be_put_in_its_place_does_not_hang():
    def land(record):
        raise ValueError("too long")

    with Reader(tiny_experts.store(), "buffered") as r:
        with pytest.raises(UserError, match="cannot be put into its slot"):
            r.wait([r.submit(0, 0, land, True)])


# --- the simulated link ---------------------------------------------------------------------


def test_a_link_charges_from_when_a_request_was_issued():
    link, now = Link(1e6), time.perf_counter()
    link.finish(now - 5, 1_000_000)  # issued so long ago that it is through
    assert link.next == pytest.approx(now - 4)
    link.finish(now - 5, 1_000_000)  # behind the first
    assert link.next == pytest.approx(now - 3)
    link.finish(now, 1000)  # nothing was going on in between
    assert link.next == pytest.approx(now + 0.001)


def test_the_system_says_what_it_read():
    counted = system_read_bytes()
    assert counted is None or counted >= 0


def test_records_reach_the_slots_they_are_meant_for(mode):
    from m2r2kit.experts.slots import Bank

    store = tiny_experts.store("olmoe", 4)
    bank = Bank(store.manifest.pieces_of(1), 3)
    with Reader(store, mode) as r:
        r.wait([r.submit(1, 6, lambda record: bank.write(2, record), True)])
    view = tiny_experts.resident("olmoe", 4)
    from mlx.utils import tree_flatten

    right = dict(tree_flatten(view.blocks[1].mlp.switch_mlp.parameters()))
    for name, array in bank.arrays.items():
        assert np.array_equal(np.array(array[2]), np.array(right[name][6]))
        assert not np.array(array[:2]).any()
