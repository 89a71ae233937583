"""Prompt files: one JSON object a line, with `id` and `prompt` (and `kind`, if there are kinds)."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .records import ROOT

ALL = ROOT / "data" / "prompts" / "all.jsonl"
TUNING = ROOT / "data" / "prompts" / "tuning.jsonl"


@dataclass(frozen=True)
class Prompt:
    id: str
    prompt: str
    kind: str = ""


def read(path: str | Path) -> list[Prompt]:
    """All prompts of a file, in order.

    Raises:
        UserError: no such file, no prompt in it, or a broken line (the message says which).
    """
    path, prompts = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})."
        ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            prompt = Prompt(str(found["id"]), found["prompt"], str(found.get("kind", "")))
            if not isinstance(prompt.prompt, str):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}, line {number} is not a JSON object with 'id' and 'prompt'.") from None
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} holds no prompt.")
    if len({p.id for p in prompts}) < len(prompts):
        raise UserError(f"{path} gives two prompts the same id.")
    return prompts


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
