"""Lookahead decoding: n-grams from Jacobi iterations beside the text, verified in the same pass."""

import numpy as np

from ...common import UserError
from ...model.backbone import Backbone
from ...model.tree_pass import check_rows
from ..tree import Tree
from .base import Drafter


class Lookahead(Drafter):
    """Drafts n-grams that begin with the pending token, from a pool that the model fills by the way.

    A window of W columns and n - 1 levels runs beside the text. Column i guesses what stands 1 + i
    positions after the pending token, and each level what follows the level before it; level 0 sees
    its earlier columns, later ones only their own column. In each pass the model says what follows
    the last level: that closes W n-grams for the pool, and is the next window's last level.

    Lookahead decoding (arXiv 2402.02057) reports up to 1.8x on MT-Bench; we have all of it for one
    device: window, pool (also from the prompt), both branches in one masked pass, exact sampling.

    Args:
        window: W.
        ngram: n, tokens of an n-gram; n - 1 of them are drafts.
        candidates: n-grams with the same first token in the pool, and chains in a pass.
    """

    def __init__(self, backbone: Backbone, window: int = 5, ngram: int = 4, candidates: int = 5):
        if window < 1 or ngram < 2 or candidates < 1:
            raise UserError("Lookahead needs a window and a pool of at least 1, and n-grams of at least 2.")
        check_rows(backbone)
        self.context = backbone.context
        self.window, self.ngram, self.candidates = window, ngram, candidates

    def begin(self, prompt, capacity):
        self.pool: dict[int, list[tuple]] = {}
        for i in range(len(prompt) - self.ngram + 1):
            self.remember(prompt[i : i + self.ngram])
        random = np.random.default_rng(0)  # level 0 begins with any tokens of the prompt
        self.levels = [random.choice(prompt, self.window + self.ngram - 2).tolist()]

    def remember(self, ngram: list[int]) -> None:
        """Put an n-gram into the pool, the newest last; the oldest with its first token may go."""
        known, rest = self.pool.setdefault(ngram[0], []), tuple(ngram[1:])
        if rest in known:
            known.remove(rest)
        known.append(rest)
        del known[: -self.candidates]

    def __call__(self, text, drafts, sampler, cache):
        found = self.pool.get(text[-1], [])[::-1]
        chains = [list(rest[:drafts]) for rest in found]
        capacity = self.context - len(text)  # the cache must not grow for positions beside the text
        while len((tree := Tree.of_chains(chains)).tokens) > capacity:
            chains.pop()
        if len(tree.tokens) + sum(map(len, self.levels)) > capacity:
            return tree  # what the window finds is for later, of which little is left
        wide, deep = len(self.levels[0]), len(self.levels)
        level, column = np.divmod(np.arange(deep * wide), wide)
        same = (column[:, None] == column) & (level <= level[:, None])
        before = (level == 0) & (column <= column[:, None])
        extra = [token for tokens in self.levels for token in tokens]
        return Tree.of_chains(chains, extra, (1 + level + column).tolist(), same | before)

    def look(self, choices: list[int]) -> None:
        """The model's first choices after the rows of the window, from the pass just made."""
        if not choices:
            return  # the window was left out
        new = choices[-len(self.levels[0]) :]
        if len(self.levels) < self.ngram - 1:  # still filling; the text has moved on by one
            self.levels = [tokens[1:] for tokens in [*self.levels, new]]
            return
        for ngram in zip(*self.levels, new, strict=True):
            self.remember(list(ngram))
        self.levels = [*self.levels[1:], new]
