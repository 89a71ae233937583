"""Figures of drafting and verifying: one step token by token, and several steps (notebook 04).

A sign marks the outcome of each token, so that the figures read without colours:

    =  accepted: the model predicts the same    ?  after the first wrong draft: discarded
    x  the first wrong draft                    +  the model's own token
"""

from dataclasses import dataclass

from .style import PALE, visible

EDGE = "#333333"
SIGNS = "Signs: = accepted draft, x first wrong draft, ? later draft, + the model's own token."


@dataclass
class Step:
    """One step of draft and verify, with tokens as text.

    Attributes:
        drafted: the g drafts, in order.
        emitted: the accepted drafts, then one token of the model.
        pending: the token from which the step starts.

    Raises:
        ValueError: `emitted` does not begin with drafts followed by one token.
    """

    drafted: list[str]
    emitted: list[str]
    pending: str = ""

    def __post_init__(self):
        n = len(self.emitted) - 1
        if not 0 <= n <= len(self.drafted) or self.drafted[:n] != self.emitted[:n]:
            raise ValueError(f"{self.emitted} are not the first of {self.drafted} and one token more")

    @property
    def accepted(self) -> int:
        return len(self.emitted) - 1

    @property
    def signs(self) -> str:
        """One sign per draft: `=`, `x` or `?`."""
        right, wrong = self.accepted, len(self.drafted) - self.accepted
        return "=" * right + "x" * min(1, wrong) + "?" * (wrong - 1)

    @property
    def moments(self) -> int:
        """Number of events: each draft, the verification, and each emitted token."""
        return len(self.drafted) + 1 + len(self.emitted)


LOOKS = {"=": (PALE["blue"], "-"), "x": ("white", "--"), "?": ("white", ":"), "+": (PALE["orange"], "-")}


def draw_step(ax, step: Step, moment: int | None = None) -> str:
    """One step after its first `moment` events (0..step.moments; None shows all).

    Three rows: the pending token and the drafts, the model's tokens from the verifying pass, and the emitted
    tokens. Each of the model's tokens is below the draft that it is compared with.
    """
    ax.clear()
    ax.set_axis_off()
    g, n = len(step.drafted), step.accepted
    moment = step.moments if moment is None else min(max(moment, 0), step.moments)
    drafted, asked, written = min(moment, g), moment > g, max(0, moment - g - 1)
    for y, name in ((2, "draft"), (1, "the model says"), (0, "emitted")):
        ax.text(-0.65, y, name, ha="right", va="center")
    box(ax, 0, 2, "", step.pending, PALE["grey"], "-")
    for x, text in enumerate(step.drafted[:drafted], 1):
        judged = x <= written or written == len(step.emitted)
        sign = step.signs[x - 1] if judged else ""
        box(ax, x, 2, sign, text, *LOOKS.get(sign, ("white", "-")))
        _arrow(ax, (x - 0.6, 2), (x - 0.4, 2))
    for x in range(1, g + 2 if asked else 1):
        # after the first wrong draft the model's tokens follow from a wrong prefix
        known = x <= n + 1
        box(ax, x, 1, "", step.emitted[x - 1] if known else "..", "white", "-" if known else ":")
        if x <= min(written, g):
            ax.text(x, 1.5, "same" if x <= n else "differs", ha="center", va="center", fontsize=9)
    for x, text in enumerate(step.emitted[:written], 1):
        sign = "=" if x <= n else "+"
        box(ax, x, 0, sign, text, *LOOKS[sign], bold=sign == "+")
    ax.set(xlim=(-2.2, g + 1.7), ylim=(-0.5, 2.5))
    return _told(step, drafted, asked, written)


def _told(step: Step, drafted: int, asked: bool, written: int) -> str:
    g, n = len(step.drafted), step.accepted
    if not asked:
        return f"{drafted} of {g} tokens are drafted, one after the other. None is verified yet."
    if written == 0:
        return f"One pass over {g + 1} tokens: the model predicts the next token after each of them."
    if written <= n:
        return f"Draft {written} is the model's token: it is accepted (=)."
    if n == g:
        return f"All {g} drafts were right, and the pass gives one more token (+): {g + 1} from one pass."
    later = f", and the {g - n - 1} later drafts are discarded (?)" if n + 1 < g else ""
    return (
        f"Draft {n + 1} is not the model's token (x). The model's own token replaces it (+){later}. "
        f"Emitted in this step: {n + 1}."
    )


def draw_steps(ax, steps: list[Step]) -> str:
    """Several steps, one row each, with the signs of this file."""
    ax.clear()
    ax.set_axis_off()
    widest = 1
    for y, step in enumerate(steps):
        ax.text(-0.6, -y, f"step {y + 1}", ha="right", va="center")
        for x, (sign, text) in enumerate(zip(step.signs, step.drafted)):
            box(ax, x, -y, sign, text, *LOOKS[sign])
        box(ax, len(step.drafted) + 0.3, -y, "+", step.emitted[-1], *LOOKS["+"], bold=True)
        widest = max(widest, len(step.drafted) + 1)
    ax.set(xlim=(-1.5, widest + 0.4), ylim=(-len(steps) + 0.4, 0.6))
    drafted, kept = sum(len(s.drafted) for s in steps), sum(s.accepted for s in steps)
    return (
        f"{SIGNS} In {len(steps)} steps {drafted} tokens were drafted, {kept} accepted, and "
        f"{kept + len(steps)} emitted."
    )


def box(ax, x, y, sign, text, color, line="-", bold=False, width=1.0) -> None:
    """Draw a token in a box, with its sign before it."""
    frame = {"boxstyle": "round,pad=0.3", "facecolor": color, "edgecolor": EDGE, "linestyle": line,
             "linewidth": width}  # fmt: skip
    ax.text(x, y, f"{sign} {visible(text) or '∅'}".strip(), ha="center", va="center", fontsize=9, bbox=frame,
            parse_math=False, fontfamily="monospace", fontweight="bold" if bold else "normal")  # fmt: skip


def _arrow(ax, start, end) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": EDGE})
