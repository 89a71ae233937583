"""Figure of a tree of drafts and its accepted path (notebook 04)."""

from .steps import EDGE, box
from .style import PALE


def draw_tree(ax, tokens: list[str], parents: list[int], path: list[int], pending: str, own: str) -> str:
    """Draw drafts as a tree, from left to right; the accepted path has thick lines and the sign `=`.

    Args:
        tokens: the text of each draft.
        parents: index of each draft's parent, or -1 for the pending token; parents come before children.
        path: indices of the accepted drafts, in order; may be empty.
        pending: the token at the root.
        own: the token that the model generates after the accepted drafts.

    Raises:
        ValueError: a parent comes after its child, or `path` does not follow the parents.
    """
    if len(parents) != len(tokens) or any(not -1 <= p < i for i, p in enumerate(parents)):
        raise ValueError("each draft needs a parent that comes before it, or -1")
    if [-1, *path][:-1] != [parents[i] for i in path]:
        raise ValueError(f"the drafts {path} do not follow one another in the tree")
    ax.clear()
    ax.set_axis_off()
    depths = []
    for parent in parents:
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
    deepest, heights = max(depths, default=0), _heights(parents)
    places = {-1: (0, heights[-1])} | {i: (depths[i], heights[i]) for i in range(len(tokens))}
    for i, parent in enumerate(parents):
        kept = i in path
        (x0, y0), (x1, y1) = places[parent], places[i]
        ax.plot([x0, x1], [y0, y1], color=EDGE, linewidth=3 if kept else 0.8, linestyle="-" if kept else ":",
                zorder=0)  # fmt: skip
    box(ax, *places[-1], "", pending, PALE["grey"])
    for i, text in enumerate(tokens):
        kept = i in path
        look = (PALE["blue"], "-") if kept else ("white", ":")
        box(ax, *places[i], "=" if kept else "", text, *look, bold=kept, width=1.8 if kept else 0.8)
    # below the tree, where the model's own token covers no draft
    low = min(y for _, y in places.values()) - 1.1
    end = places[path[-1] if path else -1]
    ax.plot([end[0], end[0] + 1], [end[1], low], color=EDGE, linewidth=3, zorder=0)
    box(ax, end[0] + 1, low, "+", own, PALE["orange"], bold=True, width=1.8)
    ax.set(xlim=(-0.6, max(deepest, len(path) + 1) + 0.6), ylim=(low - 0.6, max(heights.values()) + 0.6))
    taken = "".join(tokens[i] for i in path)
    said = f"{len(path)} of them ({taken!r}, =)" if path else "none of them"
    return (
        f"{len(tokens)} drafts in a tree of depth {deepest}: {len(tokens) + 1} positions in one pass. The "
        f"model accepts {said} and adds its own {own!r} (+): {len(path) + 1} emitted."
    )


def _heights(parents: list[int]) -> dict[int, float]:
    """Vertical position of each draft: one line per leaf, top first; parents are centred on children."""
    children: dict[int, list[int]] = {i: [] for i in range(-1, len(parents))}
    for i, parent in enumerate(parents):
        children[parent].append(i)
    heights, lines = {}, 0

    def place(i):
        nonlocal lines
        for child in children[i]:
            place(child)
        if children[i]:
            heights[i] = (heights[children[i][0]] + heights[children[i][-1]]) / 2
        else:
            heights[i], lines = -float(lines), lines + 1

    place(-1)
    return heights
