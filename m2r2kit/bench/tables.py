"""Tables for the terminal, a notebook and Markdown."""

import html
import textwrap
from collections.abc import Sequence

GAP = "  "
NARROW = 12  # minimum width of a wrapped column, in characters
LEAST = 40  # minimum width of a table, in characters


class Table:
    """A table that renders as text (`print`), in a notebook (the last value of a cell) or as Markdown.

    Args:
        heads: of the columns.
        rows: of cell texts; short rows are padded with empty cells.
        caption: text above the table.
        details: for each row, sentences to show below it.
        left: heads of left-aligned columns besides the first; the others are right-aligned.
        bold: first cells to set in bold, in a notebook.
        fold: in a notebook, details unfold on a click.
    """

    def __init__(
        self,
        heads: Sequence[str],
        rows: Sequence[Sequence[str]],
        caption: str = "",
        details: Sequence[Sequence[str]] = (),
        left: Sequence[str] = (),
        bold: Sequence[str] = (),
        fold: bool = False,
    ):
        self.heads, self.caption, self.bold, self.fold = tuple(heads), caption, tuple(bold), fold
        self.rows = [(*row, *[""] * (len(heads) - len(row))) for row in rows]
        self.details = details or [[] for _ in rows]
        self.left = [i == 0 or head in left for i, head in enumerate(heads)]

    def as_text(self, width: int | None = None) -> str:
        """Aligned columns; long cells are wrapped to fit `width` characters, if given."""
        widths = [max(map(len, column)) for column in zip(self.heads, *self.rows)]
        if width is not None:
            width = max(LEAST, width)
            while sum(widths) + len(GAP) * (len(widths) - 1) > width and max(widths) > NARROW:
                widths[widths.index(max(widths))] -= 1
        lines = [self.caption, ""] if self.caption else []
        lines += self._lines(self.heads, widths)
        for row, details in zip(self.rows, self.details, strict=True):
            lines += self._lines(row, widths)
            for text in details:
                lines += textwrap.wrap(
                    text, (width or 10**6) - 6, initial_indent=" " * 4, subsequent_indent=" " * 6
                )
        return "\n".join(lines)

    def _lines(self, cells: Sequence[str], widths: list[int]) -> list[str]:
        """The lines of one row."""
        parts = [
            textwrap.wrap(cell, n) if len(cell) > n else [cell] for cell, n in zip(cells, widths, strict=True)
        ]
        out = []
        for i in range(max(map(len, parts))):
            texts = [part[i] if i < len(part) else "" for part in parts]
            sides = zip(texts, widths, self.left, strict=True)
            out.append(GAP.join(t.ljust(n) if left else t.rjust(n) for t, n, left in sides).rstrip())
        return out

    __str__ = __repr__ = as_text

    def as_markdown(self) -> str:
        """As Markdown; details follow the first cell."""
        lines = [self.heads, ["---" if left else "---:" for left in self.left]]
        for (first, *cells), details in zip(self.rows, self.details, strict=True):
            lines.append([": ".join([first, *details]), *cells])
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )

    def _repr_html_(self) -> str:
        sides = [f'style="text-align: {"left" if left else "right"}"' for left in self.left]
        caption = f"<p>{html.escape(self.caption)}</p>" if self.caption else ""
        heads = "".join(
            f"<th {side}>{html.escape(h)}</th>" for h, side in zip(self.heads, sides, strict=True)
        )
        rows = []
        for row, details in zip(self.rows, self.details, strict=True):
            first, *cells = (html.escape(cell) for cell in row)
            first = f"<b>{first}</b>" if row[0] in self.bold else first
            more = "<br>".join(map(html.escape, details))
            if more and self.fold:
                first = f"<details><summary>{first}</summary><small>{more}</small></details>"
            elif more:
                first += f"<br><small>{more}</small>"
            cells = zip([first, *cells], sides, strict=True)
            rows.append("<tr>" + "".join(f"<td {side}>{cell}</td>" for cell, side in cells) + "</tr>")
        body = "".join(rows)
        return f"{caption}<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
