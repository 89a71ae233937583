"""Prints generated text on a terminal: accepted drafts underlined, early exits shaded by depth."""

import sys

from ..driver import Segment

SHADES = (22, 28, 34, 40)  # green, 256 colours; earlier exits are lighter
UNDERLINED, PLAIN = "\x1b[4m", "\x1b[0m"


class Printer:
    """Prints segments as they are generated, then a summary line to standard error.

    Args:
        exits: depths at which tokens may exit, ascending; such a token is followed by its depth.
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
        """End the last line and print the summary."""
        print(flush=True)
        print(summary, file=sys.stderr)
