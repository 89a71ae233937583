"""The text, its tokens and windows, and the downloads."""

import http.server
import io
import json
import threading
import zipfile

import numpy as np
import pytest

from m2r2kit.common import UserError
from m2r2kit.pocket import tokenizer as tokens
from m2r2kit.text import corpus, download

# --- text ---------------------------------------------------------------------------------

QUESTION = {"question": "What is 2 + 3?", "answer": "It is 2 + 3 = <<2+3=5>>5.\n#### 5"}
PAGE = {"page": "common/ls", "text": "# ls\n\n> List files.\n\n- List [a]ll files:\n\n`ls -a`\n"}


@pytest.fixture
def folder(tmp_path):
    """A corpus of 200 questions and 200 pages."""
    questions = [{**QUESTION, "question": f"What is {i} + 3?"} for i in range(200)]
    pages = [{**PAGE, "page": f"common/ls{i}"} for i in range(200)]
    for name, records in ((corpus.GSM8K, questions), (corpus.TLDR, pages)):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path


def test_arithmetic_is_written_without_the_calculator_marks(folder):
    document = corpus.arithmetic_documents(folder)[2]
    assert document.text == "<|user|>What is 2 + 3?<|assistant|>It is 2 + 3 = 5.\n#### 5"


def test_a_page_is_asked_for_by_name_and_by_purpose(folder):
    page, examples = corpus.shell_documents(folder)[:2]
    assert page.text.startswith("<|user|>How do I use the command ls0? List files.<|assistant|># ls")
    assert examples.text == "<|user|>List all files with ls0.<|assistant|>`ls -a`"
    assert page.name == examples.name  # held out together or not at all


METHOD = '''
class A:
    def add(self, a, b):
        """Add two
        numbers.

        More."""
        return a + b
'''


def test_functions_become_exchanges():
    (turn,) = corpus._function_turns(METHOD)
    prompt, answer = turn.split("<|assistant|>")
    assert prompt == "<|user|>Write a Python function add(a, b). Add two numbers."
    assert answer.startswith("def add(self, a, b):\n    ")
    assert corpus._function_turns("def broken(:") == []


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"question": "no answer"}', '{"question": 1, "answer": "2"}', ""]
)
def test_a_broken_line_is_named(folder, line):
    file = folder / corpus.GSM8K
    file.write_text(json.dumps(QUESTION) + "\n" + line + "\n" + json.dumps(QUESTION) + "\n")
    with pytest.raises(
        UserError, match=r"gsm8k_train\.jsonl, line 2: not a JSON object with text in question"
    ):
        corpus.arithmetic_documents(folder)


def test_a_missing_corpus_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is missing; give the folder"):
        corpus.shell_documents(tmp_path)


# --- tokens -------------------------------------------------------------------------------


@pytest.fixture
def documents(folder):
    return corpus.arithmetic_documents(folder) + corpus.shell_documents(folder)


def test_digits_are_single_and_text_comes_back(documents):
    tokenizer = tokens.train_tokenizer([d.text for d in documents], 400)
    text = "x = 1234 + naïve\n\tπ"
    encoding = tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    assert [t for t in encoding.tokens if t in "1234"] == list("1234")
    assert [tokenizer.token_to_id(t) for t in (corpus.EOS, corpus.USER, corpus.ASSISTANT)] == [0, 1, 2]


def test_held_out_documents_are_never_among_the_training_tokens(documents, tmp_path):
    held_out = [d for d in documents if d.held_out]
    assert 0 < len(held_out) < 0.1 * len(documents)
    tokenizer, rows = tokens.prepare(tmp_path / "run", lambda: documents, 400)
    seen = {k: tokenizer.decode(r, skip_special_tokens=False).split(corpus.EOS) for k, r in rows.items()}
    for d in documents:
        assert (d.text in seen[d.kind]) is not d.held_out, d.name


def test_prepared_tokens_are_kept(documents, tmp_path):
    _, first = tokens.prepare(tmp_path, lambda: documents, 400)
    _, again = tokens.prepare(tmp_path, lambda: pytest.fail("the corpus was read again"))
    assert all(np.array_equal(first[kind], again[kind]) for kind in corpus.KINDS)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(
        ["tokenizer.json", "tokens.npz", corpus.GSM8K, corpus.TLDR]
    )
    (tmp_path / "tokens.npz").write_bytes((tmp_path / "tokens.npz").read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged; delete both"):
        tokens.prepare(tmp_path, lambda: documents)


def test_windows_depend_on_seed_and_step_alone():
    rows = {"code": np.arange(1000), "arithmetic": np.arange(1000, 1500), "shell": np.arange(1500, 1600)}
    batches = tokens.Batches(rows)
    windows = batches(7, 10, 17)
    assert windows.shape == (10, 17)
    assert np.array_equal(windows, tokens.Batches(rows)(7, 10, 17))
    assert not np.array_equal(windows, batches(8, 10, 17))
    assert not np.array_equal(windows, tokens.Batches(rows, seed=1)(7, 10, 17))
    assert (np.diff(windows) == 1).all()  # a window is a piece of one kind
    starts = np.concatenate([batches(step, 10, 17)[:, 0] for step in range(200)])
    shares = np.histogram(starts, [0, 1000, 1500, 1600])[0] / len(starts)
    assert np.allclose(shares, [0.4, 0.3, 0.3], atol=0.01)


def test_too_little_text_is_one_sentence():
    with pytest.raises(UserError, match="the shell text has 5 tokens, and a window needs 17"):
        tokens.Batches({"shell": np.arange(5)})(0, 2, 17)


# --- downloads ----------------------------------------------------------------------------


def archive(pages: dict) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, text in pages.items():
            file.writestr(name, text)
    return content.getvalue()


LINKED = (
    "# tar\n\n> Archiving utility.\n> More information: <https://example.org>.\n\n- Pack:\n\n`tar cf a b`\n"
)
PAGES = {f"common/{name}.md": LINKED for name in ("tar", "curl", "git-commit")}


def test_pages_are_converted_without_links():
    for prefix in ("", "tldr-2.2/pages/"):
        content = archive({prefix + k: v for k, v in PAGES.items()} | {"LICENSE.md": "x", "index.json": "{}"})
        records = [json.loads(line) for line in download.tldr_lines(content, least=3).splitlines()]
        assert [r["page"] for r in records] == ["common/curl", "common/git-commit", "common/tar"]
        assert records[2]["text"] == "# tar\n\n> Archiving utility.\n\n- Pack:\n\n`tar cf a b`\n"


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"<html>not found</html>", "not an archive of pages"),
        (archive(PAGES), "3 pages instead of 4,000 or more"),
        (archive({f"common/{i}.md": LINKED for i in range(4001)}), "4,001 pages instead of"),
    ],
)
def test_an_archive_of_another_shape_is_refused(content, reason):
    with pytest.raises(ValueError, match=reason):
        download.tldr_lines(content)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A local server of a few files: name -> (bytes, announced length)."""
    files = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in files:
                return self.send_error(404)
            content, length = files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("M2R2KIT_CACHE", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", files
        running.shutdown()
        thread.join()


def test_both_files_are_downloaded_once(server, monkeypatch, tmp_path):
    url, files = server
    lines = json.dumps(QUESTION).encode() + b"\n"
    files["/train.jsonl"] = (lines, len(lines))
    pages = archive(PAGES | {f"linux/{i}.md": LINKED for i in range(4000)})
    files["/pages.zip"] = (pages, len(pages))
    monkeypatch.setattr(download, "GSM8K_SHA256", download.hashlib.sha256(lines).hexdigest())
    folder = download.corpus_folder(f"{url}/train.jsonl", f"{url}/pages.zip")
    assert len(corpus.arithmetic_documents(folder)) == 1
    assert len(corpus.shell_documents(folder)) == 2 * 4003
    files.clear()
    assert download.corpus_folder(f"{url}/train.jsonl", f"{url}/pages.zip") == folder
    assert sorted(f.name for f in folder.iterdir()) == sorted([corpus.GSM8K, corpus.TLDR])


def test_a_download_that_goes_wrong_is_one_sentence_and_leaves_nothing(server, tmp_path):
    url, files = server
    files["/other"] = (b"other bytes", 11)
    files["/cut"] = (b"half", 1000)
    target = tmp_path / "cache" / "file"
    for name, reason in (
        ("other", r"is not what this kit expects \(SHA-256 .{12}\.\. instead of 17f347dc5147"),
        ("cut", r"cannot be downloaded \(the connection ended after 4 of 1,000 bytes"),
        ("missing", r"cannot be downloaded \(HTTP Error 404"),
    ):
        with pytest.raises(UserError, match=reason) as raised:
            download.fetch(f"{url}/{name}", target, download.gsm8k_lines)
        assert "\n" not in str(raised.value) and "--corpus" in str(raised.value)
    with pytest.raises(UserError, match="cannot be downloaded"):
        download.fetch("http://127.0.0.1:1/x", target, download.gsm8k_lines)
    assert not target.parent.exists()


def test_one_file_in_so_many_and_all_that_are_held_out():
    few, fewer = corpus.code_documents(every=30), corpus.code_documents(every=90)
    held_out = [{d.name for d in some if d.held_out} for some in (few, fewer)]
    others = [{d.name for d in some if not d.held_out} for some in (few, fewer)]
    assert held_out[0] == held_out[1] and len(held_out[0]) > 3
    assert 0 < len(others[1]) < len(others[0])
