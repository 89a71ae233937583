"""Draft trees: verified in one masked pass, of which the best path is accepted.

The drafts are deterministic (q is one-hot), so sampling uses the rule for such candidates (SpecInfer, arXiv
2305.09781; also EAGLE-2): accept a candidate with its probability in p; if it is rejected, remove it from p
and try the next. A chain is a tree of width one.
"""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..common import UserError
from ..model.backbone import Backbone
from ..model.tree_pass import keep_positions, masked_states
from .accept import Sampler


@dataclass
class Tree:
    """A tree of drafts, and extra rows that the model computes for the drafter but that are never accepted.

    Row 0 of the pass is the pending token, row i the i-th draft.

    Attributes:
        tokens: the drafts, each parent before its children.
        parents: for each draft the row of the token it follows; 0 is the pending token.
        extra: tokens of the extra rows; all attend to the text and the pending token.
        distance: distance of each extra row from the pending token, in positions.
        among: bool (n, n), which extra rows each extra row attends to, itself included.

    Raises:
        UserError: a parent that is missing or comes after its child, or two children of one parent with the
            same token.
    """

    tokens: list[int]
    parents: list[int]
    extra: list[int] = field(default_factory=list)
    distance: list[int] = field(default_factory=list)
    among: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=bool))

    def __post_init__(self):
        misplaced = any(not 0 <= parent < row for row, parent in enumerate(self.parents, 1))
        if len(self.parents) != len(self.tokens) or misplaced:
            raise UserError("Each draft of a tree needs a parent that comes before it.")
        if len(self.rows_of()) < len(self.tokens):
            raise UserError("Drafts that follow the same token must differ; leave the second one out.")

    @classmethod
    def of_chains(cls, chains: list[list[int]], *extra) -> "Tree":
        """Merge chains that follow the pending token; common prefixes become one path. `extra` are the
        attributes after `parents`.
        """
        rows: dict[tuple[int, int], int] = {}
        for chain in chains:
            row = 0
            for token in chain:
                row = rows.setdefault((row, token), len(rows) + 1)
        return cls([token for _, token in rows], [parent for parent, _ in rows], *extra)

    def rows_of(self) -> dict[tuple[int, int], int]:
        """The row of each draft by its parent's row and its token."""
        return {key: row for row, key in enumerate(zip(self.parents, self.tokens, strict=True), 1)}

    @property
    def depths(self) -> list[int]:
        """Distance of each row from the pending token, which has depth 0."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths

    @property
    def depth(self) -> int:
        """Number of drafts on the longest path, the most that can be accepted."""
        return max(self.depths)

    def rows(self, pending: int, position: int) -> tuple[list[int], list[int], np.ndarray]:
        """Tokens, positions and mask of all rows for the masked pass, extra rows last."""
        drafts = 1 + len(self.tokens)
        T = drafts + len(self.extra)
        mask = np.eye(T, dtype=bool)
        for row, parent in enumerate(self.parents, 1):
            mask[row] |= mask[parent]  # a draft sees itself and what its parent sees
        mask[drafts:, 0] = True
        mask[drafts:, drafts:] = self.among
        places = [position + d for d in [*self.depths, *self.distance]]
        return [pending, *self.tokens, *self.extra], places, mask


def verify_tree(backbone: Backbone, tree: Tree, pending: int, cache: list) -> tuple[mx.array, mx.array]:
    """Logits (T, V) and last states (1, T, D) of all rows; the cache grows by T positions.

    Raises:
        UserError: the tree extends beyond the model's context.
    """
    start = cache[0].offset
    if (capacity := backbone.context - start - 1) < tree.depth:
        raise UserError(
            f"A tree of depth {tree.depth} does not fit the context, which has {capacity} tokens left; "
            "draft fewer tokens."
        )
    tokens, positions, mask = tree.rows(pending, start)
    h, logits = masked_states(backbone, mx.array([tokens]), mx.array(positions), mx.array(mask), cache)
    return logits, h


def accept_tree(
    tree: Tree, logits: mx.array, sampler: Sampler, cache: list, start: int
) -> tuple[list[int], list[int], list[int]]:
    """Accept the best path, and keep only its rows in the cache after `start` verified positions.

    Returns:
        the emitted tokens, the rows that stay (the pending token and the accepted drafts), and the model's
        first choice after each extra row.
    """
    first = 1 + len(tree.tokens)
    choices = mx.argmax(logits, axis=-1).tolist() if sampler.greedy or tree.extra else []
    if sampler.greedy:
        emitted, path = best_path(tree, choices)
    else:
        emitted, path = sampled_path(tree, sampler.probabilities(logits[:first]), sampler)
    keep_positions(cache, start, path)
    return emitted, path, choices[first:]


def best_path(tree: Tree, choices: list[int]) -> tuple[list[int], list[int]]:
    """The tokens that greedy decoding emits, the longest path that agrees and the model's next token:
    (tokens, rows of the pending token and the path).

    Args:
        choices: the model's first choice after each row.
    """
    rows, path = tree.rows_of(), [0]
    while (row := rows.get((path[-1], choices[path[-1]]))) is not None:
        path.append(row)
    return [choices[row] for row in path], path


def sampled_path(tree: Tree, p: np.ndarray, sampler: Sampler) -> tuple[list[int], list[int]]:
    """The tokens that sampling emits: (tokens, rows of the pending token and the accepted drafts).

    Args:
        p: (rows, V), the model's probabilities after the pending token and each draft.
    """
    emitted, path = [], [0]
    while True:
        rest = p[path[-1]].copy()
        for (parent, token), row in tree.rows_of().items():
            if parent != path[-1]:
                continue
            if sampler.random.random() * rest.sum() < rest[token]:
                emitted.append(token)
                path.append(row)
                break
            rest[token] = 0.0
        else:
            return [*emitted, sampler.draw(rest)], path
