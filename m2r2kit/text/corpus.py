"""The training text of the pocket models: three kinds, each plain or as user/assistant turns.

| kind | source | licence |
|---|---|---|
| code | the standard library of the Python that runs this | PSF |
| arithmetic | GSM8K training questions (openai/grade-school-math) | MIT |
| shell | tldr-pages, English | CC BY 4.0 |

Python brings the code. The other two are files in a folder, given with `--corpus` or downloaded by
`download.py`; they are not part of this project.

Documents are held out by the hash of their name. All documents from one file or page share its name, so
training never sees a held-out function inside its file. Pages of one command for two systems have
different names, so held-out figures for shell are slightly optimistic.
"""

import ast
import hashlib
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from ..common import UserError, parse_json

KINDS = ("code", "arithmetic", "shell")
EOS, USER, ASSISTANT = "<|endoftext|>", "<|user|>", "<|assistant|>"
GSM8K, TLDR = "gsm8k_train.jsonl", "tldr_en.jsonl"
HELD_OUT = 0.04  # share of documents that training never sees

# Data tables, generated parsers and tests.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Document:
    """One text of the corpus. `name` decides whether it is held out."""

    kind: str
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32


def turn(prompt: str, answer: str) -> str:
    """One user/assistant exchange, as the pocket models' chat template writes it."""
    return f"{USER}{prompt.strip()}{ASSISTANT}{answer.strip()}"


# --- code ---------------------------------------------------------------------------------


LONGEST = 45  # lines of a function; longer ones do not fit the model's context


def _function_turns(source: str) -> list[str]:
    """Functions with a docstring, as exchanges: a request to write the function, and its code."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []  # some .py files are templates, not Python
    lines = source.splitlines()
    turns = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)):
            continue
        body = lines[node.lineno - 1 : node.end_lineno]
        if len(body) > LONGEST:
            continue
        indent = len(body[0]) - len(body[0].lstrip())
        code = "\n".join(line[indent:] for line in body)
        arguments = ", ".join(a.arg for a in node.args.args if a.arg not in ("self", "cls"))
        first = " ".join(doc.split("\n\n")[0].split())
        turns.append(turn(f"Write a Python function {node.name}({arguments}). {first}", code))
    return turns


def code_documents(every: int = 1) -> list[Document]:
    """The standard library: each file as it is, and its documented functions as exchanges.

    Args:
        every: n takes one training file in n, to save time; held-out files are all taken.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for i, path in enumerate(sorted(root.rglob("*.py"))):
        name = path.relative_to(root)
        if i % every and not Document("code", f"{name}", "").held_out:
            continue
        if SKIPPED_FOLDERS.intersection(name.parts) or path.stat().st_size > 150_000:
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        documents.append(Document("code", f"{name}", source.strip()))
        documents += [Document("code", f"{name}", t) for t in _function_turns(source)]
    return documents


# --- arithmetic and shell -----------------------------------------------------------------


def _records(path: Path, *fields: str) -> list[dict]:
    """The objects of a JSON Lines file, with text in each of `fields`."""
    if not path.exists():
        raise UserError(
            f"{path} is missing; give the folder that holds {GSM8K} and {TLDR} as the corpus (--corpus)"
        )
    records = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = parse_json(line)
                texts = [record[field] for field in fields]
            except (ValueError, KeyError, TypeError):
                texts = [None]
            if not all(isinstance(text, str) for text in texts):
                raise UserError(
                    f"{path}, line {number}: not a JSON object with text in {' and '.join(fields)}"
                )
            records.append(record)
    return records


def arithmetic_documents(folder: Path) -> list[Document]:
    """GSM8K's questions and worked answers, without the calculator's marks (`<<48/2=24>>`)."""
    return [
        Document("arithmetic", r["question"], turn(r["question"], re.sub(r"<<.*?>>", "", r["answer"])))
        for r in _records(folder / GSM8K, "question", "answer")
    ]


def shell_documents(folder: Path) -> list[Document]:
    """tldr pages: a question about the command, answered by its page, and one exchange for each example."""
    documents = []
    for record in _records(folder / TLDR, "page", "text"):
        page, text = record["page"], record["text"].strip()
        command = page.rsplit("/", 1)[-1]
        about = " ".join(re.findall(r"^> (.*)$", text, re.M)[:1])
        documents.append(Document("shell", page, turn(f"How do I use the command {command}? {about}", text)))
        # "- Remove [f]orcibly:" marks the letter of the flag; a user's question would not
        examples = re.findall(r"^- (.+?):\n\n`(.+?)`$", re.sub(r"\[(\w)\]", r"\1", text), re.M)
        exchanges = [turn(f"{what} with {command}.", f"`{how}`") for what, how in examples]
        if exchanges:
            documents.append(Document("shell", page, EOS.join(exchanges)))
    return documents


def documents(folder: Path) -> list[Document]:
    """Every document of the three kinds, held-out ones included."""
    kept = arithmetic_documents(folder) + shell_documents(folder)  # first: a missing file is reported at once
    return code_documents() + kept
