"""The figures in data/README.md are those of the newest records."""

import hashlib
import importlib.util
from pathlib import Path

import pytest

from m2r2kit.bench import records

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("pretrain_table", ROOT / "ci" / "pretrain_table.py")
pretrain_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrain_table)

RECORD = {
    "date": "2030-01-02T03:04:05+00:00",
    "figures": {"code": {"loss": 2.34567, "bits_per_byte": 1.1, "accuracy": 0.5432, "tokens": 59904}},
    "settings": {
        "blocks_now": 24,
        "width": 160,
        "parameters": 6_200_000,
        "tokens_seen": 15_000_000,
        "training_seconds": 7200,
    },
    "machine": {"cores": 2, "chip": "Some Chip"},
}


@pytest.fixture(params=pretrain_table.MODELS)
def model(request):
    return request.param


def test_the_table_is_the_newest_records(model):
    text = pretrain_table.README.read_text()
    record = records.latest("pretrain", model=model)
    assert pretrain_table.draw(text, model, record) == text, "run `python ci/pretrain_table.py`"


def test_a_table_of_another_record_is_another_text(model):
    text = pretrain_table.README.read_text()
    drawn = pretrain_table.draw(text, model, RECORD)
    assert drawn != text and "| code | 2.346 | 1.100 | 54.3% | 59,904 |" in drawn
    assert "6.2 M parameters, 15.0 M tokens in 2.0 hours on 2 cores of Some Chip; 2030-01-02." in drawn
    assert pretrain_table.draw(drawn, model, records.latest("pretrain", model=model)) == text


def test_the_use_of_experts_is_under_a_mixtures_table():
    experts = {"share": [[0.1, 0.2, 0.3, 0.4], [0.25] * 4], "entropy": [1.846, 2.0]}
    figures, settings = RECORD["figures"] | {"experts": experts}, RECORD["settings"] | {"top": 2}
    text = pretrain_table.table(RECORD | {"figures": figures, "settings": settings})
    assert "Of the 4 experts of a block, 2 for a token, the least used of all" in text
    assert "0.40 times an even share" in text and "and the most 1.60 times" in text
    assert "entropy 1.85 to 2.00 bits" in text and "| experts |" not in text


def test_rounded_weights_are_measured_anew_and_their_training_is_told():
    figures = {"code": RECORD["figures"]["code"] | {"loss": 2.5}}
    recall = {"direct": {"1": 0.75, "2": 0.8}}
    figures["rounding"] = {
        "tokens": 1200, "agreement": 0.98765, "before": {"loss": 1.0, "recall": recall},
        "after": {"loss": 1.00236, "recall": {"direct": {"1": 0.7512, "2": 0.8}}},
    }  # fmt: skip
    record = {
        "date": "2031-01-01T00:00:00+00:00",
        "figures": figures,
        "machine": {"cores": 64, "chip": "Large"},
    }
    text = pretrain_table.table(record | {"settings": {"model": "pocket-moe"}}, RECORD)
    assert "| code | 2.500 |" in text and "2.0 hours on 2 cores of Some Chip; 2030-01-02." in text
    assert "98.8% of 1,200 next tokens" in text and "1.0000 -> 1.0024" in text
    assert "direct 75.00% -> 75.12%." in text


def test_the_record_is_of_the_model_that_lies_here(model):
    record = records.latest("pretrain", model=model)
    weights = ROOT / "data" / model / "model.safetensors"
    if record is None or not weights.exists():
        pytest.skip("the pocket model is not there or not measured yet")
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == record["settings"]["model_sha256"]
