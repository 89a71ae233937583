"""Conversations that a chat model generates alone, to train drafters on text like its own output.

Given only the start of a user's turn, a chat model samples a question; it then answers greedily (Magpie,
Xu et al. 2024, arXiv 2406.08464). This works with any chat model, and needs no corpus.

All rows of a batch advance one position at a time. A row is filled with conversations of up to two turns, so
no computed token is wasted. An answer that loops is cut, and a row that repeats an earlier question is
dropped.

Finished rows are appended to a file in the cache folder. An interrupted run loses at most one batch, and
later trainings of the same model reuse the file.
"""

import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..common import UserError, cache_dir, parse_json, unwritable
from ..model.backbone import Backbone

TEMPERATURE = 0.9  # of questions
TURNS = 2  # of a conversation
LONGEST_QUESTION = 96  # tokens; a longer question is cut
PERIOD, REPEATS = 48, 3  # an answer loops if it ends with REPEATS copies of a piece of up to PERIOD tokens
SHORTEST_LOOP = 12  # tokens of all copies together
IDLE = 20  # batches without a new question before giving up
MARK = "\u241e"  # placeholder for a message while the chat template is split


@dataclass(frozen=True)
class Template:
    """The parts of a chat template between messages, as token ids.

    Attributes:
        opening: from the start of the text to the first user message.
        answer: from a user message to the model's answer.
        again: from an answer to the next user message.
    """

    opening: tuple[int, ...]
    answer: tuple[int, ...]
    again: tuple[int, ...]


def template(backbone: Backbone) -> Template:
    """The parts of a model's chat template.

    Raises:
        UserError: the model has no chat template, or the template alters messages.
    """
    tokenizer = backbone.tokenizer
    if not tokenizer.has_chat_template:
        raise UserError("This model has no chat template, so it cannot generate questions; give --corpus.")
    turns = [{"role": ("user", "assistant")[i % 2], "content": MARK} for i in range(3)]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    parts = text.split(MARK)
    if len(parts) != 4:
        raise UserError("This model's chat template alters messages, so its turns cannot be separated.")
    return Template(*(tuple(tokenizer.encode(p, add_special_tokens=False)) for p in (*parts[:2], parts[2])))


@dataclass
class Row:
    """One row while it is generated.

    Attributes:
        tokens: the row so far.
        forced: template tokens to append next.
        asking: whether the current turn is the user's.
        turns: finished turns of the current conversation.
        said: tokens of the current turn.
        questions: all user turns of the row.
    """

    template: Template
    tokens: list[int] = field(default_factory=list)
    forced: deque = field(default_factory=deque)
    asking: bool = True
    turns: int = 0
    said: list[int] = field(default_factory=list)
    questions: list[list[int]] = field(default_factory=list)

    def __post_init__(self):
        self.forced.extend(self.template.opening)

    def take(self, chosen: int, ends: set[int]) -> None:
        """Append the next token: a template token, or the model's choice, which may end a turn."""
        if self.forced:
            self.tokens.append(self.forced.popleft())
            return
        too_long = self.asking and len(self.said) >= LONGEST_QUESTION
        over = chosen in ends or too_long or (not self.asking and loops(self.said))
        if not over:
            self.said.append(chosen)
            self.tokens.append(chosen)
            return
        if self.asking:
            self.questions.append(self.said)
            self.forced.extend(self.template.answer)
        else:
            self.turns = (self.turns + 1) % TURNS
            self.forced.extend(self.template.again if self.turns else (min(ends), *self.template.opening))
        self.asking, self.said = not self.asking, []
        self.tokens.append(self.forced.popleft())


def loops(said: list[int]) -> bool:
    """Whether a text ends with at least `REPEATS` copies of a piece, `SHORTEST_LOOP` tokens or more."""
    for period in range(1, min(PERIOD, len(said) // REPEATS) + 1):
        times = max(REPEATS, -(-SHORTEST_LOOP // period))
        if said[-period * times :] == said[-period:] * times:
            return True
    return False


def converse(
    backbone: Backbone, rows: int, length: int, seed: int = 0, report: Callable | None = None
) -> list[Row]:
    """Generate a batch of rows of conversations.

    Args:
        rows: number of rows.
        length: tokens of a row.
        report: called with the number of rows after each position.
    """
    parts, ends = template(backbone), backbone.eos
    cache = backbone.new_cache(length, rows)
    made = [Row(parts) for _ in range(rows)]
    key = mx.random.key(seed)

    def advance(chosen: list[int]) -> mx.array:
        for row, token in zip(made, chosen, strict=True):
            row.take(token, ends)
        return mx.array([[row.tokens[-1]] for row in made])  # (B, 1)

    following = advance([0] * rows)  # the choice is ignored: the first token is the template's
    for _ in range(1, length):
        logits = backbone.logits(following, cache)[:, -1].astype(mx.float32)  # (B, V)
        chosen = mx.argmax(logits, axis=-1)
        sampling = [row.asking and not row.forced for row in made]
        if any(sampling):
            key, now = mx.random.split(key)
            sampled = mx.random.categorical(logits / TEMPERATURE, key=now)
            chosen = mx.where(mx.array(sampling), sampled, chosen)
        following = advance(chosen.tolist())
        if report:
            report(rows)
    return made


# --- the file in the cache folder -----------------------------------------------------------


def kept_file(backbone: Backbone, length: int) -> Path:
    """The file of a model's rows."""
    return cache_dir() / "conversations" / f"{backbone.sha256[:16]}-{length}.jsonl"


def read(file: Path) -> Iterator[dict]:
    """The rows of a file; broken lines are skipped: their rows are generated again."""
    if not file.exists():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = parse_json(line)
            except ValueError:
                continue
            if isinstance(row, dict) and _all(int, row.get("tokens")) and _all(str, row.get("asked")):
                yield row


def _all(kind: type, values) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def asked(text: str) -> str:
    """The key of a question for finding duplicates: letters and digits only, in lower case."""
    return re.sub(r"\W+", "", text.lower())[:80]


def write(
    backbone: Backbone,
    rows: int,
    length: int,
    batch: int = 32,
    file: Path | None = None,
    report: Callable | None = None,
) -> Path:
    """Generate rows and append them to a model's file until it holds `rows`; returns the file.

    Args:
        batch: rows generated at once.
        report: called with the number of tokens computed, after each position.

    Raises:
        UserError: the model has no chat template, or the file cannot be written.
    """
    file = kept_file(backbone, length) if file is None else file
    known, count = set(), 0
    try:
        for row in read(file):
            known |= set(row["asked"])
            count += 1
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+", encoding="utf-8") as out:
            if cut_short(file):
                out.write("\n")
            seed, idle = count, 0
            while count < rows:
                before = count
                for row in converse(backbone, min(batch, rows - count), length, seed, report):
                    questions = {asked(backbone.tokenizer.decode(q)) for q in row.questions} - {""}
                    seed += 1
                    if not questions or questions & known:
                        continue
                    known |= questions
                    count += 1
                    out.write(json.dumps({"tokens": row.tokens, "asked": sorted(questions)}) + "\n")
                out.flush()
                idle = 0 if count > before else idle + 1
                if idle == IDLE:
                    raise UserError(
                        f"The model repeats its questions: only {count} of {rows} rows were generated; "
                        "ask for fewer rows."
                    )
    except OSError as error:
        raise unwritable(file, error) from error
    return file


def cut_short(file: Path) -> bool:
    """Whether a file's last line has no line end."""
    with file.open("rb") as lines:
        if lines.seek(0, 2) == 0:
            return False
        lines.seek(-1, 2)
        return lines.read(1) != b"\n"


def load(file: Path, rows: int) -> np.ndarray:
    """The first rows of a file, int32 (rows, length)."""
    return np.array([row["tokens"] for row in islice(read(file), rows)], np.int32)
