"""Write docs/api.md from the docstrings of the public API: `python ci/api_page.py`."""

import inspect
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import m2r2kit  # noqa: E402
from m2r2kit import api  # noqa: E402

PAGE = ROOT / "docs" / "api.md"
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")


def page() -> str:
    """The whole page."""
    parts = [
        "# The API",
        "Generated from the docstrings by `python ci/api_page.py`; `help(m2r2kit.load)` shows the same text.",
    ]
    parts.append(prose(api.__doc__))
    for name in m2r2kit.__all__:
        if not name.startswith("__"):
            parts += described(name, getattr(m2r2kit, name))
    return "\n\n".join(parts) + "\n"


def described(name: str, thing) -> list[str]:
    """One function or class: heading, signature, docstring."""
    parts = [f"## `{name}`"]
    if inspect.isfunction(thing):
        parts.append(f"```python\n{signature(name, thing)}\n```")
    parts.append(prose(thing.__doc__))
    if inspect.isclass(thing):
        for method, value in vars(thing).items():
            function = getattr(value, "__func__", value)
            if inspect.isfunction(function) and not method.startswith("_") and function.__doc__:
                parts += [f"### `{name}.{method}`", prose(function.__doc__)]
    return parts


def signature(name: str, function) -> str:
    """The signature with types and defaults; a long one has one parameter on each line."""
    asked = inspect.signature(function)
    short = re.sub(r"\b(?:[a-z_]\w*\.)+(\w+)", r"\1", str(asked))
    if len(name) + len(short) < 90:
        return name + short
    parameters = [re.sub(r"\b(?:[a-z_]\w*\.)+(\w+)", r"\1", str(p)) for p in asked.parameters.values()]
    _, arrow, result = short.rpartition(") -> ")
    return f"{name}(\n" + "".join(f"    {p},\n" for p in parameters) + (f"{arrow}{result}" if arrow else ")")


def prose(doc: str) -> str:
    """A docstring as Markdown, with bold headings and lists for its sections."""
    out, section = [], None
    for line in inspect.cleandoc(doc).splitlines():
        head = line.rstrip(":")
        if line.endswith(":") and head in SECTIONS:
            section = head
            out.append(f"**{head}**\n")
        elif section and line.startswith("    ") and not line.startswith("     "):
            entry = re.match(r"    ([\w, *|]+): (.*)", line)
            named = entry and section not in ("Returns", "Yields")
            out.append(f"- `{entry[1]}`: {entry[2]}" if named else textwrap.dedent(line))
        elif section and line.strip():
            out.append("  " + line.strip())
        else:
            section = section if line.startswith(" ") or not line else None
            out.append(line)
    return "\n".join(out)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
