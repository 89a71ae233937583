"""Pictures of drafting and verifying: one step token by token, and steps one below the other (notebook 04).

Signs say what became of a draft, so that nobody needs the colours:

    =  accepted, it is what the model says      ?  drafted behind a wrong one, never asked
    x  the first wrong one                      +  the model's own token
"""

from dataclasses import dataclass

from .style import PALE, visible

EDGE = "#333333"
SIGNS = "Signs: = accepted draft, x first wrong draft, ? draft behind it, + token of the model's own."


@dataclass
class Step:
    """One round of draft and verify, as texts.

    Attributes:
        drafted: g drafts, in order.
        emitted: the accepted drafts, and one token of the model's own.
        pending: the token that the step starts from.
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
        """One sign a draft: `=`, `x` or `?`."""
        right, wrong = self.accepted, len(self.drafted) - self.accepted
        return "=" * right + "x" * min(1, wrong) + "?" * (wrong - 1)

    @property
    def moments(self) -> int:
        """How often something happens: a draft, the verification, a token that is written."""
        return len(self.drafted) + 1 + len(self.emitted)


LOOKS = {"=": (PALE["blue"], "-"), "x": ("white", "--"), "?": ("white", ":"), "+": (PALE["orange"], "-")}


def draw_step(ax, step: Step, moment: int | None = None) -> str:
    """One step after `moment` (0..step.moments; None is the end) of the things that happen in it.

    Three lines: what the drafter reads and writes, what the model says in the pass that verifies, and
    what is written. The model's answer to a token stands below the draft that it is compared with.
    """
    ax.clear()
    ax.set_axis_off()
    g, n = len(step.drafted), step.accepted
    moment = step.moments if moment is None else min(max(moment, 0), step.moments)
    drafted, asked, written = min(moment, g), moment > g, max(0, moment - g - 1)
    for y, name in ((2, "draft"), (1, "the model says"), (0, "written")):
        ax.text(-0.65, y, name, ha="right", va="center")
    box(ax, 0, 2, "", step.pending, PALE["grey"], "-")
    for x, text in enumerate(step.drafted[:drafted], 1):
        judged = x <= written or written == len(step.emitted)
        sign = step.signs[x - 1] if judged else ""
        box(ax, x, 2, sign, text, *LOOKS.get(sign, ("white", "-")))
        _arrow(ax, (x - 0.6, 2), (x - 0.4, 2))
    for x in range(1, g + 2 if asked else 1):
        # behind the first wrong draft the model has answered a question that nobody has
        known = x <= n + 1
        box(ax, x, 1, "", step.emitted[x - 1] if known else "..", "white", "-" if known else ":")
        if x <= min(written, g):
            ax.text(x, 1.5, "same" if x <= n else "differs", ha="center", va="center", fontsize=8)
    for x, text in enumerate(step.emitted[:written], 1):
        sign = "=" if x <= n else "+"
        box(ax, x, 0, sign, text, *LOOKS[sign], bold=sign == "+")
    ax.set(xlim=(-2.2, g + 1.7), ylim=(-0.5, 2.5))
    return _told(step, drafted, asked, written)


def _told(step: Step, drafted: int, asked: bool, written: int) -> str:
    g, n = len(step.drafted), step.accepted
    if not asked:
        return f"{drafted} of {g} tokens are drafted, each after the one before it. Nothing is decided yet."
    if written == 0:
        return f"One pass over {g + 1} tokens: the model says what it would write after each of them."
    if written <= n:
        return f"Draft {written} is what the model says: it is accepted (=)."
    if n == g:
        return f"All {g} drafts were right, and the last answer is one token more (+): {g + 1} from one pass."
    behind = f", and what stands behind it is dropped (?, {g - n - 1} drafted)" if n + 1 < g else ""
    return (
        f"Draft {n + 1} is not what the model says (x). The model's own token takes its place (+){behind}. "
        f"Written in this step: {n + 1}."
    )


def draw_steps(ax, steps: list[Step]) -> str:
    """Rounds of drafting, a line each; the signs are those of this file."""
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
    """A token in a box, its sign before it."""
    frame = {"boxstyle": "round,pad=0.3", "facecolor": color, "edgecolor": EDGE, "linestyle": line,
             "linewidth": width}  # fmt: skip
    ax.text(x, y, f"{sign} {visible(text) or '∅'}".strip(), ha="center", va="center", fontsize=8, bbox=frame,
            parse_math=False, fontfamily="monospace", fontweight="bold" if bold else "normal")  # fmt: skip


def _arrow(ax, start, end) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": EDGE})
