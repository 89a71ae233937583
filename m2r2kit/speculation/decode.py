"""The speculative decoder: draft, verify, accept. With 0 drafts it is plain decoding.

A step starts with one pending token, emitted but not yet in the cache:

    draft    K tokens, running the blocks below the exit E on each        (drafters/)
    verify   the K + 1 positions through blocks E..N, in one pass
    accept   the longest correct prefix and one token of the model        (accept.py)
    crop     the cache to the accepted tokens, and pass their states to the drafter
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
    """A model that decodes with a drafter. The output is that of plain decoding, whatever the drafter.

    Args:
        drafter: None is plain decoding.
        drafts: K, number of tokens drafted in a step, 0..16.
        sampler: by default greedy.
        cache: an empty cache for the next text, for a caller that inspects it; by default each text gets a
            new one.

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
        self._verified = len(prompt) - 1  # verified positions of the cache
        self.drafter.begin(prompt, capacity)
        if self._verified:
            read_prompt(self.backbone, self.drafter, prompt, self.cache)

    def step(self, pending, left):
        k, drafter, cache = min(self.drafts, left - 1), self.drafter, self.cache  # the model adds one token
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
        return Emitted(kept, drafted, min(len(emitted) - 1, len(kept)))  # the last token is the model's

    def _plain(self, pending: int, more: bool) -> Emitted:
        """A step without drafts."""
        emitted, self._ahead = one_token(self.backbone, pending, self._ahead, more, self.sampler, self.cache)
        self._verified += 1
        self._text += emitted
        if emitted[0] in self._eos:  # the next pass has already written to the cache
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
    """Run all prompt tokens but the last, and pass their states to the drafter if it needs them."""
    h = backbone.embed(mx.array([prompt[:-1]]))
    h = backbone.run(h, cache, 0, drafter.exit)
    if drafter.learns == drafter.exit:
        drafter.learn(h)
    h = backbone.run(h, cache, drafter.exit)
    if drafter.learns == backbone.depth:
        drafter.learn(h)
    mx.eval([(c.keys, c.values) for c in cache])


def one_token(backbone: Backbone, pending, ahead, more: bool, sampler: Sampler, cache: list):
    """A step without drafts: ([token], `ahead` for the next call).

    With greedy decoding the next token is computed while this one is read (if `more` follow), as in mlx-lm.
    Drafting excludes this, because the next step depends on which drafts are accepted.
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
    """One step with up to k >= 1 drafts: (emitted tokens, number of drafts, states (1, .., D)).

    K drafts (in a tree: on its longest path) emit 1..K + 1 tokens. The cache grows by at least as many
    positions. The caller keeps as many positions, and states for the drafter, as tokens were emitted.
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
        if K and isinstance(draft.tokens[0], mx.array):  # one synchronisation for both
            ids = mx.concatenate([*(t[0] for t in draft.tokens), choices]).tolist()
        else:
            ids = [*draft.tokens, *choices.tolist()]
        return accept_greedy(ids[:K], ids[K:]), K, states
    return accept_sampled(draft.tokens, draft.q, sampler.probabilities(logits), sampler), K, states


def verify(
    backbone: Backbone, drafter: Drafter, draft: Draft | Tree, pending: int, cache: list
) -> tuple[mx.array, mx.array | None]:
    """Run the pending token and K drafts through the blocks they have not passed: logits (K + 1, V), and the
    states that the drafter learns from (`Drafter.learn`), (1, K + 1, D).

    For a `Tree`: logits and last states of all its rows; `accept_tree` then selects the rows to keep in the
    cache.
    """
    if isinstance(draft, Tree):
        return verify_tree(backbone, draft, pending, cache)
    E = drafter.exit
    read = sum(h.shape[1] for h in draft.states)
    unread = [pending, *draft.tokens][read:]  # such as the last draft
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
    states = draft.states
    if unread is not None:
        states = [*states, backbone.run(backbone.embed(unread), cache, 0, E)]
    h = mx.concatenate(states, axis=1)
    if final:
        h, logits = backbone.close(h, cache, E)
        return logits[0], h
    return backbone.finish(h, cache, E)[0], h
