"""The reader: right bytes in the right place, demand reads first, and no swallowed error."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny_experts

from m2r2kit.common import UserError
from m2r2kit.experts import reader as reading
from m2r2kit.experts.reader import AHEAD, PARKED, Link, Reader, system_read_bytes
from m2r2kit.experts.store import Store, quick_sum


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


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mode": "mapped"}, "no mapped reads; choose direct or buffered"),
        ({"threads": 0}, "threads must be at least 1; got 0"),
        ({"threads": 1.5}, "threads must be at least 1; got 1.5"),
        ({"link": 0}, "link must be above 0 bytes/s; got 0"),
        ({"link": -1.0}, "link must be above 0 bytes/s; got -1.0"),
    ],
    ids=str,
)
def test_settings_with_which_nothing_would_be_read_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Reader(tiny_experts.store(), **settings)


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
    """An `os.preadv` that fails for one expert a given number of times."""

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
        with pytest.raises(UserError, match="cannot be written into its slot"):
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
    if sys.platform == "linux":
        before = re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.M)
        assert counted is not None and 0 <= counted <= int(before[1])
    else:
        assert counted is None


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


# --- no wait is endless ---------------------------------------------------------------------


def raising(error: BaseException):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("no more"), ValueError("odd")])
def test_whatever_a_read_raises_is_one_sentence(monkeypatch, error):
    with Reader(tiny_experts.store(), "buffered") as r:
        monkeypatch.setattr(reading.os, "preadv", raising(error))
        with pytest.raises(UserError, match=r"Expert 3 of block 1 cannot be read"):
            r.wait([r.submit(1, 3, lambda record: None, True)])
        monkeypatch.undo()
        r.wait([r.submit(1, 3, lambda record: None, True)])  # the threads go on


def test_no_memory_for_a_buffer_is_one_sentence(monkeypatch):
    monkeypatch.setattr(reading.mmap, "mmap", raising(OSError(errno.ENOMEM, "Cannot allocate memory")))
    with pytest.raises(UserError, match=r"no memory or threads .*use fewer --threads"):
        Reader(tiny_experts.store(), "buffered")


def test_no_thread_to_read_is_one_sentence_and_those_that_began_end(monkeypatch):
    real, begun = threading.Thread.start, []

    def start(thread):
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(UserError, match="can't start new thread"):
        Reader(tiny_experts.store(), "buffered", threads=3)
    begun[0].join(10)
    assert not begun[0].is_alive()


def test_a_thread_that_ends_raises_in_the_one_that_waits(monkeypatch):
    gate = threading.Event()

    def serve(self, request, buffer):
        gate.wait(60)
        raise SystemExit("gone")

    monkeypatch.setattr(Reader, "_serve", serve)
    with Reader(tiny_experts.store(), "buffered", threads=1) as r:
        request = r.submit(0, 0, lambda record: None, True)
        threading.Timer(0.2, gate.set).start()
        with pytest.raises(UserError, match=r"thread that reads experts ended \(gone\)"):
            r.wait([request])
        with pytest.raises(UserError, match="ended"):
            r.submit(0, 1, lambda record: None, True)


def test_a_closed_reader_says_so():
    r = Reader(tiny_experts.store(), "buffered")
    r.close()
    with pytest.raises(UserError, match="is closed"):
        r.submit(0, 0, lambda record: None, True)


def test_closing_does_not_wait_for_a_read_that_hangs(monkeypatch):
    """As after Ctrl-C while a disk does not answer: late reads are discarded."""
    gate, begun, landed, real = threading.Event(), threading.Event(), Landed(), os.preadv

    def hang(*args):
        begun.set()
        gate.wait(60)
        return real(*args)

    monkeypatch.setattr(reading, "PATIENCE", 0.1)
    monkeypatch.setattr(reading.os, "preadv", hang)
    r = Reader(tiny_experts.store(), "buffered", threads=1)
    try:
        r.submit(0, 0, landed.at(0, 0), True)
        assert begun.wait(10)
        r.close()
        assert not gate.is_set() and r._threads[0].is_alive()
    finally:
        gate.set()
    r._threads[0].join(10)
    assert not r._threads[0].is_alive() and not landed
    r.close()  # now its files close too
    assert not r._files


def test_ctrl_c_ends_a_wait_for_a_read_that_hangs(tmp_path):
    """In a process of its own, with a signal from outside."""
    code = (
        "import os, sys, threading, time\nfrom m2r2kit.experts import reader\n"
        "from m2r2kit.experts.store import Store\n"
        "os.preadv = lambda *_: (print('hangs', flush=True), time.sleep(600))\n"
        "with reader.Reader(Store(sys.argv[1]), 'buffered') as r:\n"
        "    r.wait([r.submit(0, 0, lambda record: None, True)])\n"
    )
    words = [sys.executable, "-c", code, str(tiny_experts.store().folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "hangs\n"
            child.send_signal(signal.SIGINT)
            _, said = child.communicate(timeout=60)
            assert child.returncode != 0 and "KeyboardInterrupt" in said
        finally:
            child.kill()


# --- every read is checked ------------------------------------------------------------------


def test_a_record_that_rots_while_the_store_is_in_use_does_not_land(tmp_path, mode):
    """It was right when it was first read."""
    store, landed = copied(tmp_path), Landed()
    size = store.manifest.record_bytes
    for at in (0, 4096 + 5, size - 1):  # padding too
        with Reader(store, mode) as r:
            r.wait([r.submit(2, 4, landed.at(2, 4), True)])
            right = landed.pop((2, 4))
            content = bytearray(store.path(2).read_bytes())
            content[4 * size + at] ^= 128
            store.path(2).write_bytes(content)
            with pytest.raises(UserError, match=r"Expert 4 of block 2 .*checksum is wrong"):
                r.wait([r.submit(2, 4, landed.at(2, 4), True)])
            r.wait([r.submit(2, 3, landed.at(2, 3), True)])
            assert set(landed) == {(2, 3)}
            content[4 * size + at] ^= 128
            store.path(2).write_bytes(content)
            r.wait([r.submit(2, 4, landed.at(2, 4), True)])
            assert landed[2, 4] == right


def test_a_quick_sum_sees_flipped_bits_and_pages_that_are_lost_or_exchanged():
    rng = np.random.default_rng(0)
    record = rng.integers(0, 256, 5 * 4096, dtype=np.uint8)
    right, sums = quick_sum(record), set()
    for at in rng.integers(0, record.size, 50):
        for bit in range(8):
            record[at] ^= 1 << bit
            sums.add(quick_sum(record))
            record[at] ^= 1 << bit
    pages = record.reshape(5, 4096)
    for other in (pages[[1, 0, 2, 3, 4]], pages[[0, 1, 2, 3, 3]], np.vstack([pages[:4], 0 * pages[:1]])):
        sums.add(quick_sum(np.ascontiguousarray(other).reshape(-1)))
    assert right not in sums and quick_sum(record) == right
