"""Who drafts: the one interface of the loop, and the drafters that need nothing of their own.

A drafter may run the blocks below its exit on the tokens that it reads. The slow states, keys and
values of those blocks are then already those of the model, and the verification goes on from
there. `exit` 0 means that nothing was computed ahead: the verification starts from the embeddings.
"""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ...common import UserError
from ...model.backbone import Backbone, crop
from ...model.cpu.fast_math import fast_exp
from ...stream.stream import AcceleratedStream
from ..accept import Sampler


@dataclass
class Draft:
    """What a drafter hands over for verification.

    Attributes:
        tokens: drafted tokens, in order; ints, or lazy (1, 1) arrays while greedy. None at all
            makes the step one of plain decoding.
        states: slow states h_E (1, n, D) of the pending token and of those drafts that have been
            through the blocks below the exit, in order; empty where the exit is 0.
        q: for each token what it was drawn from, (V,) each; empty while greedy.
    """

    tokens: list = field(default_factory=list)
    states: list[mx.array] = field(default_factory=list)
    q: list[np.ndarray] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """Drafts that can be accepted at most."""
        return len(self.tokens)

    def take(self, logits: mx.array, sampler: Sampler) -> mx.array:
        """Draft one more token, from logits (1, 1, V); returns it as the (1, 1) array to read next."""
        if sampler.greedy:  # nobody waits for it: it is computed while the next one is being prepared
            self.tokens.append(mx.argmax(logits, axis=-1))
            mx.async_eval(self.tokens[-1])
            return self.tokens[-1]
        self.q.append(sampler.probabilities(logits[0])[0])
        self.tokens.append(sampler.draw(self.q[-1]))
        return as_row(self.tokens[-1])

    def take_certain(self, tokens: list[int], sampler: Sampler, vocabulary: int) -> None:
        """Draft tokens that no dice chose: each is drawn from a distribution that is all its own."""
        self.tokens += tokens
        if not sampler.greedy:
            self.q += list(np.eye(1, vocabulary, token)[0] for token in tokens)


class Drafter:
    """The interface. The loop calls `begin` once, then in each step `__call__`, verifies, and calls `learn`.

    Attributes:
        exit: E, blocks that it runs on each token it reads.
        learns: depth of the states that `learn` is given, E or N; None if it needs none.
        threshold: how sure it must be to draft on; 0 if it never stops by itself.
    """

    exit = 0
    learns: int | None = None
    threshold = 0.0

    def begin(self, prompt: list[int], capacity: int) -> None:
        """Forget the last text; the caches start with a capacity of `capacity` tokens."""

    def learn(self, states: mx.array) -> None:
        """Slow states at the depth `learns` of the tokens that have just been verified, (1, T, D):
        after the first pass those of the prompt but for its last token, later those of the pending
        token and the accepted drafts."""

    def look(self, choices: list[int]) -> None:
        """The model's first choices after the extra rows of a tree (tree.py), from the pass just made."""

    def __call__(self, text: list[int], drafts: int, sampler: Sampler, cache: list) -> Draft:
        """Draft after a text.

        Args:
            text: prompt and answer; all but the last token, which is pending, are verified.
            drafts: draft at most this many tokens, at least 1.
            cache: the model's; the blocks below the exit grow by the tokens that are read, the
                others hold the verified len(text) - 1 positions.

        Several continuations are a `Tree` (tree.py); `learn` is then given the last states, whatever
        `learns` is, and the cache must hold the verified positions only.
        """
        raise NotImplementedError


def as_row(token) -> mx.array:
    """A token as the models read it, (1, 1)."""
    return token if isinstance(token, mx.array) else mx.array([[token]])


class Plain(Drafter):
    """Drafts nothing: the loop is then plain decoding."""

    def __call__(self, text, drafts, sampler, cache):
        return Draft()


class EarlyExit(Drafter):
    """Reads the bare residual h_E at the exit (the logit lens).

    LayerSkip (arXiv 2404.16710) reports up to 2.16x on CNN/DM; of its parts we have the draft from
    the first E blocks, the shared states and keys and the verification by the rest, not the training
    with layer dropout and early-exit loss.
    """

    def __init__(self, backbone: Backbone, exit: int):
        check_exit(backbone, exit)
        self.backbone, self.exit = backbone, exit

    def _read(self, token: mx.array, cache: list, verified: int, position: int) -> tuple[mx.array, mx.array]:
        """What comes of one token (1, 1) at a position, where `verified` positions are: the slow state at
        the exit (1, 1, D), and logits (1, 1, V)."""
        return self.backbone.read(token, cache, self.exit)

    def __call__(self, text, drafts, sampler, cache):
        draft, token, verified = Draft(), as_row(text[-1]), len(text) - 1
        for ahead in range(drafts):
            h, logits = self._read(token, cache, verified, verified + ahead)
            draft.states.append(h)
            token = draft.take(logits, sampler)
        return draft


class M2R2(EarlyExit):
    """Reads the accelerated residual p_E, which stands for the end of the model.

    The verification begins where the drafts have left the slow stream (`AcceleratedStream.slow_depth`):
    that, and not E, is the `exit` of this drafter.

    Args:
        exit: E, where p is read; by default the stream's first exit.
        threshold: draft on while the chance that all drafts so far are right, by p_E's own
            probabilities, is at least this; 0 drafts as many as it is asked for.
    """

    def __init__(
        self, backbone: Backbone, stream: AcceleratedStream, exit: int | None = None, threshold: float = 0.0
    ):
        self.backbone, self.stream, self.threshold = backbone, stream, threshold
        self.read_at = exit or stream.config.exits[0]
        stream.interval(self.read_at)  # refuses an exit that it was not trained for
        self.exit = stream.slow_depth(self.read_at)
        self.learns = backbone.depth if stream.config.carry else None
        self._last = None  # the model's last state, of the newest verified token
        self._before = None  # the last state of the token before: the model's, then the draft's own

    def begin(self, prompt, capacity):
        self._last = None

    def learn(self, states):
        self._last = states[:, -1:]

    def _read(self, token, cache, verified, position):
        h, self._before, logits = self.stream.read(
            token, cache, verified, self.read_at, self._before, position
        )
        return h, logits

    def __call__(self, text, drafts, sampler, cache):
        self._before = self._last
        draft, token, chance, sure = Draft(), as_row(text[-1]), 1.0, None
        while len(draft.tokens) < drafts:
            verified = len(text) - 1
            h, logits = self._read(token, cache, verified, verified + len(draft.tokens))
            if self.exit:
                draft.states.append(h)
            token = draft.take(logits, sampler)
            if self.threshold == 0:
                continue
            if not sampler.greedy:  # its numbers are here already
                chance *= float(draft.q[-1][draft.tokens[-1]])
                if chance < self.threshold:
                    break
                continue
            # the next draft is under way before it is known whether it was worth it: that is quicker
            # than to wait each time, and the last one is thrown away
            before, sure = sure, confidence(logits)
            mx.async_eval(sure)
            if before is not None:
                chance *= before.item()
                if chance < self.threshold:
                    del draft.tokens[-1], draft.states[len(draft.tokens) :]
                    break
        # below the last block as far as the drafts go; in it the verification writes its keys again
        crop(cache[: self.exit], len(text) - 1 + len(draft.states))
        crop(cache[self.exit : self.read_at], len(text) - 1)
        return draft


@mx.compile
def confidence(logits: mx.array) -> mx.array:
    """Probability of the first choice, from logits (1, 1, V); one number."""
    return 1 / fast_exp(logits.astype(mx.float32) - logits.max()).sum()


def check_exit(backbone: Backbone, exit: int) -> None:
    """Refuse an exit that a model does not have."""
    if not 1 <= exit < backbone.depth:
        raise UserError(f"The exit must lie between 1 and {backbone.depth - 1}; got {exit}.")
