"""Prompt files: one JSON object a line, in this kit's format or that of three published sets.

| set | fields | kind |
|---|---|---|
| this kit's, Koala | `id`, `prompt`, optional `kind` | `kind`, else the file's name |
| MT-Bench | `question_id`, `category`, `turns` | `category` |
| Self-Instruct | `id`, `instruction`, `instances` (the first one's `input`) | the file's name |
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ..common import ROOT, UserError, missing_advice, parse_json

ALL = ROOT / "data" / "prompts" / "all.jsonl"
TUNING = Path(__file__).with_name("tuning.jsonl")  # in the package, because training ends with tuning

OWN = ("id", "prompt")
MT_BENCH = ("question_id", "category", "turns")
SELF_INSTRUCT = ("id", "instruction", "instances")


@dataclass(frozen=True)
class Prompt:
    """A user's prompt.

    Attributes:
        kind: its category; figures are reported by kind.
        more_turns: the user's further turns, each asked after the answer to the one before.
    """

    id: str
    prompt: str
    kind: str = ""
    more_turns: tuple[str, ...] = ()


def read(path: str | Path) -> list[Prompt]:
    """All prompts of a file, in order; the format of each line is recognised by its fields.

    Raises:
        UserError: the file cannot be read or holds no prompt, a line is broken (the message says which), or
            two prompts have the same id.
    """
    path, prompts = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8-sig").split(
            "\n"
        )  # not splitlines: JSON strings may hold other line ends
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
            for text in (prompt.id, prompt.kind, *texts):
                text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, written as an escape such as \ud83d
            raise UserError(
                f"{path}, line {number} is not valid Unicode at character {error.start + 1} of a text; "
                "write it in UTF-8."
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            *names, last = (f"'{field}'" for field in form)
            raise UserError(
                f"{path}, line {number} is not a JSON object with {', '.join(names)} and {last}."
            ) from None
        if not all(text.strip() for text in texts):
            raise UserError(f"{path}, line {number} has an empty prompt; write one, or delete the line.")
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} holds no prompt.")
    if len({p.id for p in prompts}) < len(prompts):
        raise UserError(f"{path} gives two prompts the same id.")
    return prompts


def _form(found: dict) -> tuple[str, ...]:
    """The fields of the format that a line most likely has."""
    if "prompt" not in found:
        for form in (MT_BENCH, SELF_INSTRUCT):
            if any(field in found for field in form[-2:]):
                return form
    return OWN


def _prompt(found: dict, form: tuple[str, ...], name: str) -> Prompt:
    """The prompt of a line.

    Args:
        name: of the set, used as the kind where the line has none.
    """
    id, *values = (found[field] for field in form)
    if form is MT_BENCH:
        kind, turns = values
        if not isinstance(turns, list):
            raise TypeError
        return Prompt(str(id), turns[0], str(kind), tuple(turns[1:]))
    if form is SELF_INSTRUCT:
        instruction, instances = values
        parts = instruction, instances[0]["input"]  # the input may be empty
        return Prompt(str(id), "\n\n".join(filter(None, parts)), name)
    return Prompt(str(id), *values, str(found.get("kind", name)))


def first_of_each_kind(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """The first `limit` prompts of each kind, in the file's order; all if `limit` is None."""
    seen: dict[str, int] = {}
    kept = []
    for p in prompts:
        seen[p.kind] = seen.get(p.kind, 0) + 1
        if limit is None or seen[p.kind] <= limit:
            kept.append(p)
    return kept


def sha256(prompts: list[Prompt]) -> str:
    """Hash of ids and prompts, which identifies the prompts of a record."""
    text = "\n".join(json.dumps([p.id, p.prompt], ensure_ascii=False) for p in prompts)
    return hashlib.sha256(text.encode()).hexdigest()
