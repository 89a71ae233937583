"""One loop for all: draft, verify, accept. With 0 drafts it is plain decoding.

A step begins with one pending token, emitted but not yet in the cache:

    draft    K tokens, running the blocks below the exit E on each        (drafters.py)
    verify   the K + 1 rows through blocks E..N, in one pass
    accept   the longest right prefix and one token of the model's own    (accept.py)
    crop     the cache to what was accepted, and tell the drafter
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from ..common import UserError
from ..model.backbone import Backbone, crop
from ..model.cache import FIRST_ROOM
from ..model.cpu.threads import decoding
from .accept import Sampler, accept_greedy, accept_sampled
from .drafters.base import Draft, Drafter, Plain, as_row
from .tree import Tree, accept_tree, verify_tree

MOST_DRAFTS = 16


@dataclass
class Generation:
    """What came out of one prompt.

    Attributes:
        tokens: emitted ids, the end-of-text mark included if it was reached.
        drafted: drafts offered in each step (a drafter may offer fewer than it is asked for).
        accepted: drafts accepted in each step (those after an end of text do not count).
        from_draft: for each emitted token, whether it was a draft.
        seconds: from the first pass over the prompt to the last token.
        prefill_seconds: those of the first pass, over all of the prompt but its last token.
        stopped: `eos` or `length`.
    """

    tokens: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    from_draft: list[bool] = field(default_factory=list)
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    stopped: str = "length"

    @property
    def steps(self) -> int:
        """Verification passes."""
        return len(self.drafted)


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
    """Continue a prompt; the tokens are those of plain decoding whatever the drafter is.

    Args:
        prompt: token ids, at least one.
        drafter: who drafts; None is plain decoding.
        drafts: K, tokens drafted in a step, 0..16.
        max_tokens: emit at most this many (and no more than the context holds).
        on_tokens: called after each step with the new tokens and which of them were drafts.
        cache: an empty cache to fill, for who wants to look at it afterwards.

    Raises:
        UserError: an empty or over-long prompt, or a draft count out of range.
    """
    room = backbone.room_after(prompt)
    if not 0 <= drafts <= MOST_DRAFTS:
        raise UserError(f"The number of drafts must lie between 0 and {MOST_DRAFTS}; got {drafts}.")
    if max_tokens < 1:
        raise UserError(f"At least one token must be asked for; got {max_tokens}.")
    drafter, sampler = drafter or Plain(), sampler or Sampler()
    limit = min(max_tokens, room)
    cache = backbone.new_cache(len(prompt) + min(limit, FIRST_ROOM)) if cache is None else cache
    out, begun = Generation(), time.perf_counter()

    verified = len(prompt) - 1  # positions of the cache that hold the model's own states
    drafter.begin(prompt, len(prompt) + min(limit, FIRST_ROOM))
    if verified:
        read_prompt(backbone, drafter, prompt, cache)
    out.prefill_seconds = time.perf_counter() - begun
    text, ahead = list(prompt), None
    with decoding(backbone.matrix_bytes):
        while len(out.tokens) < limit and out.stopped != "eos":
            k = min(drafts, limit - len(out.tokens) - 1)  # the pass itself adds one token
            if k == 0 or isinstance(drafter, Plain):
                more = len(out.tokens) + 1 < limit
                emitted, ahead = one_token(backbone, text[-1], ahead, more, sampler, cache)
                new = _keep(out, emitted, 0, backbone.eos)
            else:
                emitted, drafted, states = draft_and_verify(backbone, drafter, text, k, sampler, cache)
                new = _keep(out, emitted, drafted, backbone.eos)
                crop(cache, verified + new)
                if drafter.learns is not None:
                    drafter.learn(states[:, :new])
            verified += new
            text += out.tokens[-new:]
            if on_tokens:
                on_tokens(out.tokens[-new:], out.from_draft[-new:])
    crop(cache, len(prompt) + len(out.tokens) - 1)
    out.seconds = time.perf_counter() - begun
    return out


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


def _keep(out: Generation, emitted: list[int], k: int, eos: set[int]) -> int:
    """Add a step's tokens to the result, cut after an end of text; returns how many were kept."""
    drafts = len(emitted) - 1  # the last one is the model's own
    kept = next((i + 1 for i, token in enumerate(emitted) if token in eos), len(emitted))
    if emitted[kept - 1] in eos:
        out.stopped = "eos"
    out.tokens += emitted[:kept]
    out.from_draft += [i < drafts for i in range(kept)]
    out.drafted.append(k)
    out.accepted.append(min(drafts, kept))
    return kept
