"""Generated text on a terminal, as it comes: drafted tokens underlined, those that left early shaded."""

import sys

from ..driver import Segment

SHADES = (22, 28, 34, 40)  # of green in a terminal of 256 colours: the earlier a token left, the lighter
UNDERLINED, PLAIN = "\x1b[4m", "\x1b[0m"


class Printer:
    """Prints segments, and at the end one line of what they took, which goes to standard error.

    Args:
        exits: depths at which tokens may leave, rising; behind such a token its depth stands.
    """

    def __init__(self, exits: tuple[int, ...] = ()):
        self.shades = dict(zip(exits, reversed(SHADES), strict=False))
        self.colours = sys.stdout.isatty()

    def __call__(self, segment: Segment) -> None:
        text = segment.text
        if self.colours and text and segment.from_draft:
            text = f"{UNDERLINED}{text}{PLAIN}"
        if self.colours and text and segment.depth in self.shades:
            text = f"\x1b[38;5;{self.shades[segment.depth]}m{text}\x1b[2m{segment.depth}{PLAIN}"
        print(text, end="", flush=True)

    def end(self, summary: str) -> None:
        """The end of the last line, and the summary."""
        print(flush=True)
        print(summary, file=sys.stderr)
