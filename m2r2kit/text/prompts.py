"""Prompt files: one JSON object a line, in the form of this kit or of three published sets.

| set | fields | kind |
|---|---|---|
| this kit's, Koala | `id`, `prompt`, perhaps `kind` | `kind`, else the file's name |
| MT-Bench | `question_id`, `category`, `turns` | `category` |
| Self-Instruct | `id`, `instruction`, `instances` (the first one's `input`) | the file's name |
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ..common import ROOT, UserError, missing_advice, parse_json

ALL = ROOT / "data" / "prompts" / "all.jsonl"
TUNING = Path(__file__).with_name("tuning.jsonl")  # training ends with them, so they are part of the package

OWN = ("id", "prompt")
MT_BENCH = ("question_id", "category", "turns")
SELF_INSTRUCT = ("id", "instruction", "instances")


@dataclass(frozen=True)
class Prompt:
    """What a user asks, and what they go on to ask after each answer (conversations.py)."""

    id: str
    prompt: str
    kind: str = ""
    more_turns: tuple[str, ...] = ()


def read(path: str | Path) -> list[Prompt]:
    """All prompts of a file, in order; the fields of each line say of which form it is.

    Raises:
        UserError: no such file, no prompt in it, or a broken line (the message says which).
    """
    path, prompts = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        what_to_do = missing_advice(path, "give a file of prompts, one JSON object a line")
        raise UserError(f"{path} cannot be read ({reason}); {what_to_do}.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        form = OWN
        try:
            found = parse_json(line)
            form = _form(found)
            prompt = _prompt(found, form, path.stem)
            texts = [prompt.prompt, *prompt.more_turns]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            *names, last = (f"'{field}'" for field in form)
            raise UserError(
                f"{path}, line {number} is not a JSON object with {', '.join(names)} and {last}."
            ) from None
        if not all(text.strip() for text in texts):
            raise UserError(f"{path}, line {number} asks nothing; write a prompt there, or delete it.")
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} holds no prompt.")
    if len({p.id for p in prompts}) < len(prompts):
        raise UserError(f"{path} gives two prompts the same id.")
    return prompts


def _form(found: dict) -> tuple[str, ...]:
    """The fields of the form that a line seems to be of."""
    if "prompt" not in found:
        for form in (MT_BENCH, SELF_INSTRUCT):
            if any(field in found for field in form[-2:]):
                return form
    return OWN


def _prompt(found: dict, form: tuple[str, ...], name: str) -> Prompt:
    """The prompt of a line; `name` is the set's."""
    id, *values = (found[field] for field in form)
    if form is MT_BENCH:
        kind, turns = values
        if not isinstance(turns, list):
            raise TypeError
        return Prompt(str(id), turns[0], str(kind), tuple(turns[1:]))
    if form is SELF_INSTRUCT:
        instruction, instances = values
        parts = instruction, instances[0]["input"]  # many need no input
        return Prompt(str(id), "\n\n".join(filter(None, parts)), name)
    return Prompt(str(id), *values, str(found.get("kind", name)))


def first_of_each_kind(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """The first `limit` prompts of each kind, in the file's order; None keeps all."""
    seen: dict[str, int] = {}
    kept = []
    for p in prompts:
        seen[p.kind] = seen.get(p.kind, 0) + 1
        if limit is None or seen[p.kind] <= limit:
            kept.append(p)
    return kept


def sha256(prompts: list[Prompt]) -> str:
    """One hash of the prompts themselves, to tell which ones a record was measured on."""
    text = "\n".join(json.dumps([p.id, p.prompt], ensure_ascii=False) for p in prompts)
    return hashlib.sha256(text.encode()).hexdigest()
