"""A repository that cannot be downloaded: each cause has its own message and advice."""

import errno
import http.server
import json
import os
import re
import threading

import httpx
import mlx.core as mx
import pytest
import tiny
from huggingface_hub import constants

from m2r2kit.common import UserError
from m2r2kit.model.backbone import Backbone
from m2r2kit.model.hub import looks_like_repository, why

COMMIT = "a" * 40
NONE = "the hub has no public repository of that name"


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that has the model `org/tiny`, and answers with the status that ends any other name."""

    def do_GET(self):
        path = self.path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        files = {file.name: file.read_bytes() for file in tiny.folder("llama").iterdir()}
        if path.startswith("/org/tiny/resolve/"):
            return self.answer(200, files[name], ETag=f'"{name}"')
        if path.startswith("/api/models/org/tiny"):
            found = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": each} for each in files]}
            if "/tree/" in path:
                found = [{"type": "file", "path": n, "size": len(f), "oid": n} for n, f in files.items()]
            return self.answer(200, json.dumps(found).encode())
        kind, code = re.search(r"/o/(\w+)-(\d+)", path + "/o/any-404").groups()
        headers = {"gated": {"X-Error-Code": "GatedRepo"}, "none": {"X-Error-Code": "RepoNotFound"}}
        return self.answer(int(code), b"{}", **headers.get(kind, {}))

    def do_HEAD(self):
        self.do_GET()

    def answer(self, code, content, **headers):
        self.send_response(code)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    files = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    yield
    server.shutdown()
    server.server_close()


def sentence(name) -> str:
    with pytest.raises(UserError) as refusal:
        Backbone.load(name)
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith(".")
    return str(refusal.value)


@pytest.mark.parametrize(
    ("name", "cause", "way_out"),
    [
        (
            "o/none-404",
            "the hub has no public repository of that name",
            "check the name, or log in",
        ),
        (
            "o/none-401",
            "the hub has no public repository of that name",
            "check the name, or log in",
        ),
        ("o/gated-403", "requires that you accept its terms", "accept them on huggingface.co"),
        ("o/any-500", "the hub answers with error 500", "try again later"),
        ("o/any-429", "the hub answers with error 429", "try again later"),
        ("o/not a name", "it is not a repository name", "give a folder or ORG/NAME"),
    ],
)
def test_what_the_hub_answers(hub, name, cause, way_out):
    said = sentence(name)
    assert cause in said and way_out in said and name in said


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "the hub cannot be reached; check the network" in sentence("org/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://no-such-host.invalid")
    assert "the hub's host name cannot be resolved; check the network" in sentence("org/tiny")


def test_offline_by_choice(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids downloads; unset HF_HUB_OFFLINE" in sentence("org/tiny")


def test_disks_and_connections_that_break_off(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # `ci/kit.py test` sets it
    for number, cause in ((errno.ENOSPC, "the disk is full; free some space"), (errno.EACCES, "permission")):
        failure = RuntimeError("download failed")
        failure.__cause__ = OSError(number, os.strerror(number), "file")
        assert cause in why("org/tiny", failure) and "org/tiny" in why("org/tiny", failure)
    cut = httpx.RemoteProtocolError("peer closed connection without sending complete message body")
    assert why("org/tiny", cut) == (
        "The download of org/tiny was interrupted; run the same command again to resume it."
    )
    assert "cannot be downloaded (something new);" in why("org/tiny", Exception("something new"))


def test_a_repository_is_loaded_and_a_folder_of_its_name_that_is_no_model_is_not(hub, tmp_path):
    os.makedirs(tmp_path / "org" / "tiny" / "stream")
    tokens = mx.array([tiny.prompt(7)])
    view = Backbone.load("org/tiny")
    assert mx.array_equal(view.logits(tokens), tiny.backbone("llama").logits(tokens))
    assert view.sha256 == tiny.backbone("llama").sha256
    assert Backbone.of(view.model, view.tokenizer).sha256 == view.sha256


def test_names_of_repositories():
    assert looks_like_repository("org/name")
    for name in ("name", "a/b/c", "/org/name", "./name", "../name", "~/name", "org/", "data/pocket-dense"):
        assert not looks_like_repository(name)
