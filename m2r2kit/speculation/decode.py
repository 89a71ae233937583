"""The decoder that drafts, verifies and accepts. With 0 drafts it is plain decoding.

A step begins with one pending token, emitted but not yet in the cache:

    draft    K tokens, running the blocks below the exit E on each        (drafters/)
    verify   the K + 1 positions through blocks E..N, in one pass
    accept   the longest right prefix and one token of the model's own    (accept.py)
    crop     the cache to what was accepted, and tell the drafter
"""

from collections.abc import Callable

import mlx.core as mx

from .. import driver
from ..common import UserError
from ..driver import Decoder, Emitted, Generation, until_end
from ..model.backbone import Backbone, crop
from .accept import Sampler, accept_greedy, accept_sampled
from .drafters.base import Draft, Drafter, Plain, as_row
from .tree import Tree, accept_tree, verify_tree

MOST_DRAFTS = 16


class Speculation(Decoder):
    """A model that decodes with a drafter; the tokens are those of plain decoding whatever the drafter is.

    Args:
        drafter: who drafts; None is plain decoding.
        drafts: K, tokens drafted in a step, 0..16.
        cache: an empty cache for the next text, for a caller that wants to look at it; by default a new
            one for each text.

    Raises:
        UserError: a draft count out of range.
    """

    def __init__(
        self,
        backbone: Backbone,
        drafter: Drafter | None = None,
        drafts: int = 4,
        sampler: Sampler | None = None,
        cache: list | None = None,
    ):
        if not 0 <= drafts <= MOST_DRAFTS:
            raise UserError(f"The number of drafts must lie between 0 and {MOST_DRAFTS}; got {drafts}.")
        self.backbone, self.drafter, self.drafts = backbone, drafter or Plain(), drafts
        self.sampler, self._empty = sampler or Sampler(), cache

    def begin(self, prompt, capacity):
        self.cache = self.backbone.new_cache(capacity) if self._empty is None else self._empty
        self._empty, self._eos = None, self.backbone.eos
        self._text, self._ahead = list(prompt), None
        self._verified = len(prompt) - 1  # positions of the cache that hold the model's own states
        self.drafter.begin(prompt, capacity)
        if self._verified:
            read_prompt(self.backbone, self.drafter, prompt, self.cache)

    def step(self, pending, left):
        k, drafter, cache = min(self.drafts, left - 1), self.drafter, self.cache  # the pass adds one token
        if k == 0 or isinstance(drafter, Plain):
            return self._plain(pending, left > 1)
        emitted, drafted, states = draft_and_verify(
            self.backbone, drafter, self._text, k, self.sampler, cache
        )
        kept = until_end(emitted, self._eos)
        self._verified += len(kept)
        crop(cache, self._verified)
        if drafter.learns is not None:
            drafter.learn(states[:, : len(kept)])
        self._text += kept
        return Emitted(kept, drafted, min(len(emitted) - 1, len(kept)))  # the last one is the model's own

    def _plain(self, pending: int, more: bool) -> Emitted:
        """A step without drafts."""
        emitted, self._ahead = one_token(self.backbone, pending, self._ahead, more, self.sampler, self.cache)
        self._verified += 1
        self._text += emitted
        if emitted[0] in self._eos:  # the token after it has been read already
            crop(self.cache, self._verified)
        return Emitted(emitted)


def generate(
    backbone: Backbone,
    prompt: list[int],
    drafter: Drafter | None = None,
    drafts: int = 4,
    max_tokens: int = 128,
    sampler: Sampler | None = None,
    on_tokens: Callable[[list[int], list[bool]], None] | None = None,
    cache: list | None = None,
) -> Generation:
    """Continue a prompt of token ids: `driver.generate` with a `Speculation` of these arguments.

    Raises:
        UserError: an empty or over-long prompt, or a draft count out of range.
    """
    return driver.generate(
        Speculation(backbone, drafter, drafts, sampler, cache), prompt, max_tokens, on_tokens
    )


def read_prompt(backbone: Backbone, drafter: Drafter, prompt: list[int], cache: list) -> None:
    """All but the last token of a prompt into the cache, and to the drafter if it wants their states."""
    h = backbone.embed(mx.array([prompt[:-1]]))
    h = backbone.run(h, cache, 0, drafter.exit)
    if drafter.learns == drafter.exit:
        drafter.learn(h)
    h = backbone.run(h, cache, drafter.exit)
    if drafter.learns == backbone.depth:
        drafter.learn(h)
    mx.eval([(c.keys, c.values) for c in cache])


def one_token(backbone: Backbone, pending, ahead, more: bool, sampler: Sampler, cache: list):
    """A step without drafts: ([token], what to pass as `ahead` next time).

    While a token is read, the next is already being computed (if there is to be one `more`), as
    mlx-lm does; with drafts that is not possible, since the next step starts where they fail.
    """

    def first_choice(token):
        return mx.argmax(backbone.logits(token, cache), axis=-1)  # (1, 1)

    if not sampler.greedy:
        logits = backbone.logits(mx.array([[pending]]), cache)[0]
        return [sampler.draw(sampler.probabilities(logits)[0])], None
    choice = first_choice(mx.array([[pending]])) if ahead is None else ahead
    ahead = first_choice(choice) if more else None
    mx.async_eval(choice) if ahead is None else mx.async_eval(choice, ahead)
    return [choice.item()], ahead


def draft_and_verify(
    backbone: Backbone, drafter: Drafter, text: list[int], k: int, sampler: Sampler, cache: list
) -> tuple[list[int], int, mx.array | None]:
    """One step with up to k >= 1 drafts: (tokens that it emits, how many were drafted, states).

    Of K drafts (in a tree: on its longest path) it emits 1..K + 1 tokens. The cache grows by as many
    positions at least, of which the caller keeps as many as were emitted; so it does of the states
    (1, .., D), which the drafter may want.
    """
    draft = drafter(text, k, sampler, cache)
    logits, states = verify(backbone, drafter, draft, text[-1], cache)
    K = draft.depth
    if isinstance(draft, Tree):
        emitted, path, seen = accept_tree(draft, logits, sampler, cache, len(text) - 1)
        drafter.look(seen)
        return emitted, K, states[:, mx.array(path)]
    if sampler.greedy:
        choices = mx.argmax(logits, axis=-1)
        if K and isinstance(draft.tokens[0], mx.array):  # one wait for the draft and its verification
            ids = mx.concatenate([*(t[0] for t in draft.tokens), choices]).tolist()
        else:
            ids = [*draft.tokens, *choices.tolist()]
        return accept_greedy(ids[:K], ids[K:]), K, states
    return accept_sampled(draft.tokens, draft.q, sampler.probabilities(logits), sampler), K, states


def verify(
    backbone: Backbone, drafter: Drafter, draft: Draft | Tree, pending: int, cache: list
) -> tuple[mx.array, mx.array | None]:
    """The pending token and K drafts through all blocks that they have not been through: logits
    (K + 1, V), and the states that the drafter wants (`Drafter.learn`), (1, K + 1, D).

    Of a `Tree` those of all rows, and the last states; the cache then holds rows to choose from
    (`accept_tree`).
    """
    if isinstance(draft, Tree):
        return verify_tree(backbone, draft, pending, cache)
    E = drafter.exit
    read = sum(h.shape[1] for h in draft.states)
    unread = [pending, *draft.tokens][read:]  # such as the last draft, which nobody has drafted after
    if all(isinstance(token, int) for token in unread):
        unread = mx.array([unread]) if unread else None
    else:
        unread = mx.concatenate([as_row(token) for token in unread], axis=1)
    final = drafter.learns == backbone.depth
    if E == 0:
        if not final:
            return backbone.logits(unread, cache)[0], None
        h, logits = backbone.read(unread, cache, backbone.depth)
        return logits[0], h
    rows = draft.states
    if unread is not None:
        rows = [*rows, backbone.run(backbone.embed(unread), cache, 0, E)]
    h = mx.concatenate(rows, axis=1)
    if final:
        h, logits = backbone.close(h, cache, E)
        return logits[0], h
    return backbone.finish(h, cache, E)[0], h
