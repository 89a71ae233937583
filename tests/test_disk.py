"""Measuring a disk: every byte is read, with threads or without; what cannot be measured is reported."""

import pytest
import tiny_experts

from m2r2kit import common as paths
from m2r2kit.bench import disk as probe
from m2r2kit.common import UserError
from m2r2kit.experts import packing
from m2r2kit.experts.store import PAGE, Store

SIZE = tiny_experts.store().manifest.record_bytes


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_all_reads_are_made_wherever_they_fall(threads, monkeypatch):
    real, seen = probe.os.preadv, []

    def preadv(file, buffers, place):
        seen.append(place)
        return real(file, buffers, place)

    monkeypatch.setattr(probe.os, "preadv", preadv)
    found = probe.speed(tiny_experts.store(), SIZE, threads, "buffered", reads=20)
    assert len(seen) == 20 and all(place % PAGE == 0 for place in seen) and found.seen > 0
    before, seen[:] = sorted(seen), []
    probe.speed(tiny_experts.store(), SIZE, 1, "buffered", reads=20)
    assert sorted(seen) == before  # the same places whatever the threads


def test_a_read_that_comes_short_is_a_sentence(monkeypatch):
    monkeypatch.setattr(probe.os, "preadv", lambda *_: 5)
    with pytest.raises(UserError, match="was short"):
        probe.speed(tiny_experts.store(), SIZE, 2, "buffered", 4)


def test_a_store_can_be_read_after_it_was_forgotten():
    assert probe.forget(tiny_experts.store()) in (True, False)
    assert probe.speed(tiny_experts.store(), SIZE, 1, "buffered", 4).seen > 0


def test_where_there_is_no_disk_one_sentence_says_so(monkeypatch):
    store = tiny_experts.store()

    def refuse(path, mode):
        raise UserError("it cannot be opened so.")

    with monkeypatch.context() as patch:
        patch.setattr(probe, "open_file", refuse)
        mode, said = probe.way(store)
    assert mode == "buffered" and said.startswith("No direct reads here") and said.endswith("opened so.")
    for system, expected in ((0.0, "buffered"), (1e6, "direct"), (None, "direct")):
        monkeypatch.setattr(probe, "speed", lambda *_, system=system: probe.Speed(1e6, system))
        mode, said = probe.way(store)
        assert mode == expected and ("simulated link" in said) == (expected == "buffered")


def test_a_store_in_the_cache_folder_is_packed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(packing, "cache_dir", lambda: tmp_path)
    first = packing.kept(tiny_experts.model())
    assert isinstance(first, Store) and first.folder.parent == tmp_path / "experts"
    monkeypatch.setattr(packing, "pack", None)
    assert packing.kept(tiny_experts.model()).manifest == first.manifest
