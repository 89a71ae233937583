"""Files and folders are written completely or not at all; a failure reports its cause."""

import errno
import os
import resource
import threading

import mlx.core as mx
import pytest

from m2r2kit.common import REMEDIES, UserError, cache_dir, check_writable, unwritable, whole, write_whole


def everything(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_file_appears_when_it_is_whole(tmp_path):
    file = tmp_path / "new" / "folder" / "a.safetensors"
    with whole(file) as new:
        mx.save_safetensors(str(new), {"a": mx.zeros(3)})
        assert not file.exists()
    assert mx.load(str(file))["a"].shape == (3,)
    assert everything(tmp_path) == {"new", "new/folder", "new/folder/a.safetensors"}
    write_whole(file, "other")
    assert file.read_text() == "other"


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_fails_leaves_all_as_it_was(tmp_path, failure):
    (tmp_path / "old").write_text("old")
    for name in ("old", "new/folder/file"):
        with pytest.raises(failure), whole(tmp_path / name) as new:
            new.write_text("half")
            raise failure
    assert everything(tmp_path) == {"old"} and (tmp_path / "old").read_text() == "old"


def test_a_folder_appears_when_it_is_whole_and_replaces_none(tmp_path):
    with whole(tmp_path / "model") as new:
        new.mkdir()
        (new / "config.json").write_text("{}")
    assert everything(tmp_path) == {"model", "model/config.json"}
    with pytest.raises(UserError, match="it exists already; delete it"), whole(tmp_path / "model") as new:
        new.mkdir()
        (new / "other").write_text("")
    assert everything(tmp_path) == {"model", "model/config.json"}


def test_a_folder_takes_the_place_of_another_if_asked(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("")
    with pytest.raises(ValueError), whole(tmp_path / "model", replace=True) as new:
        new.mkdir()
        raise ValueError
    assert everything(tmp_path) == {"model", "model/old"}
    with whole(tmp_path / "model", replace=True) as new:
        new.mkdir()
        (new / "new").write_text("")
    assert everything(tmp_path) == {"model", "model/new"}


def test_nothing_of_the_users_is_touched(tmp_path):
    names = {"a.new", "a.partial", ".a.tmp", ".m2r2kit-"}
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").write_text("")
    write_whole(tmp_path / "a", "text")
    assert {name for name in everything(tmp_path) if "/" not in name} == names | {"a"}
    assert all((tmp_path / name / "kept").exists() for name in names)


def test_two_that_write_at_once_do_not_meet(tmp_path):
    ready = threading.Barrier(2, timeout=30)

    def write(text):
        with whole(tmp_path / "a") as new:
            ready.wait()
            new.write_text(text)
            ready.wait()

    threads = [threading.Thread(target=write, args=(text * 1000,)) for text in "xy"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_text() in ("x" * 1000, "y" * 1000) and everything(tmp_path) == {"a"}


def test_links_are_followed_and_pipes_written_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    reader.start()
    check_writable(tmp_path / "pipe")
    write_whole(tmp_path / "pipe", "text")
    reader.join(30)
    assert found == ["text"]


# --- what prevents it -----------------------------------------------------------------------


def sentence(write, file) -> str:
    with pytest.raises(UserError) as refusal:
        write(file)
    return str(refusal.value)


WRITERS = (check_writable, lambda file: write_whole(file, "text"))


@pytest.mark.parametrize("write", WRITERS)
def test_the_cause_is_named(tmp_path, write):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    assert "a part of its path is a file" in sentence(write, tmp_path / "file" / "a")
    assert "a part of its path is a file" in sentence(write, tmp_path / "file" / "a" / "b")
    assert "there is a folder of that name" in sentence(write, tmp_path / "folder")
    assert "the name is too long" in sentence(write, tmp_path / ("n" * 300))
    assert "the name is too long" in sentence(write, tmp_path / ("n" * 300) / "a")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert "a part of its path is a file" in sentence(write, tmp_path / "link" / "a")
    assert everything(tmp_path) == {"file", "folder", "link"}


def test_a_file_that_can_hold_only_a_part_is_not_kept(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # to this process, as a full disk to all
    try:
        said = sentence(lambda file: write_whole(file, "x" * 2000), tmp_path / "a")
        with pytest.raises(UserError, match="free some space"), whole(tmp_path / "a.safetensors") as new:
            mx.save_safetensors(str(new), {"a": mx.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "larger than this disk or this process allows" in said and everything(tmp_path) == set()


def test_every_cause_has_a_sentence():
    for number, remedy in REMEDIES.items():
        assert str(unwritable("f", OSError(number, ""))) == f"f cannot be written: {remedy}."
    assert "Input/output error" in str(unwritable("f", OSError(errno.EIO, os.strerror(errno.EIO))))


def test_the_remedy_of_an_unwritable_cache_is_its_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("M2R2KIT_CACHE", str(tmp_path / "file" / "cache"))
    for write in WRITERS:
        assert sentence(write, cache_dir() / "a").endswith("; set M2R2KIT_CACHE to another folder.")


def test_other_errors_are_left_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), whole(tmp_path / "a"):
        (tmp_path / "none").read_text()
    with pytest.raises(RuntimeError, match="of something else"), whole(tmp_path / "a"):
        raise RuntimeError("of something else")


def test_asking_leaves_nothing(tmp_path):
    (tmp_path / "old").write_text("old")
    for name in ("old", "new", "far/away/new"):
        check_writable(tmp_path / name)
    assert everything(tmp_path) == {"old"} and (tmp_path / "old").read_text() == "old"
