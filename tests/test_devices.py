"""The roofline, against numbers worked out by hand and the ridges of others."""

import tomllib

import pytest
import tiny
from mlx.utils import tree_flatten

from m2r2kit.bench.devices import FILE, LLAMA_7B, Device, DevicesTable, Shape, draft_and_verify, read

BY_HAND = Device("by hand", peak=8e12, bandwidth=1e12)  # 2 bytes a weight: 8 rows are free
SHAPE = Shape(blocks=8, block=100, head=200)  # 1000 weights


def test_a_pass_takes_as_long_as_the_slower_of_reading_and_computing():
    assert BY_HAND.seconds(1e9, 1) == pytest.approx(0.002)  # 2 GB at 1 TB/s
    assert BY_HAND.seconds(1e9, 8) == pytest.approx(0.002)
    assert BY_HAND.seconds(1e9, 16) == pytest.approx(0.004)  # 32 GFLOP at 8 TFLOP/s
    assert BY_HAND.seconds(1e9, 8, 0.5) == pytest.approx(0.002)  # 4 bit: computing sets the pace
    assert (BY_HAND.ridge(), BY_HAND.ridge(0.5)) == (8, 2)


def test_draft_and_verify_by_hand():
    assert draft_and_verify(BY_HAND, SHAPE, 2, 5) == (pytest.approx(0.4), pytest.approx(1.0))
    assert draft_and_verify(BY_HAND, SHAPE, 2, 12) == (pytest.approx(0.4), pytest.approx(1.5))
    assert draft_and_verify(BY_HAND, SHAPE, 2, 5, 0.5) == (pytest.approx(0.4), pytest.approx(2.5))


def test_the_ridges_are_those_that_others_computed():
    """`A100-80G 153 / 43; M2 Ultra 34 / 10`, in 16 and about 4.5 bit: 0.5 bytes and the scales."""
    ridges = {device.name: (device.ridge(), device.ridge(4.5 / 8)) for device in read()}
    assert ridges["A100 80 GB"] == (pytest.approx(153, abs=0.5), pytest.approx(43, abs=0.5))
    assert ridges["M2 Ultra"] == (pytest.approx(34, abs=0.5), pytest.approx(10, abs=0.5))


def test_each_figure_has_its_source():
    rows = tomllib.loads(FILE.read_text(encoding="utf-8"))["device"]
    assert [row["name"] for row in rows] == ["A100 80 GB", "M2 Ultra", "M3 Max", "M4 (MacBook Air)"]
    for row in rows:
        assert set(row["vendor"]) <= {"peak", "bandwidth"} and all("." in each for each in row["sources"])
        said = " ".join(row["sources"])
        assert set(row["vendor"]) == {"peak", "bandwidth"} or "Apple states none" in said


def test_a_shape_counts_what_a_model_has():
    view = tiny.backbone()
    shape = Shape.of(view.config)
    sizes = {name: w.size for name, w in tree_flatten(view.model.parameters())}
    read_in_a_pass = sum(n for name, n in sizes.items() if "norm" not in name and "embed" not in name)
    assert shape.weights == read_in_a_pass and shape.blocks == tiny.BLOCKS
    assert LLAMA_7B.weights / 1e9 == pytest.approx(6.607, abs=0.001)  # 6.74 billion less the embeddings


def test_the_table_puts_the_measured_through_the_computed():
    table = DevicesTable({"tau": 3.0, "g": 4.0}, SHAPE, 2, [BY_HAND])
    assert table.speedup(BY_HAND) == pytest.approx(3 / (4 * 0.4 + 1))
    assert table.speedup(BY_HAND, 0.5) == pytest.approx(3 / (4 * 0.4 + 2.5))
    assert table.rows == [
        ("by hand", "16 bit", "8", "0.0 ms", "0.40", "1.00", "1.15x", "0.83x"),
        ("by hand", "4 bit", "2", "0.0 ms", "0.40", "2.50", "0.73x", "0.73x"),
    ]
    assert repr(table).startswith("Computed, not measured: ") and "by hand" in repr(table)
