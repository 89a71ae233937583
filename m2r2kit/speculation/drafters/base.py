"""The drafter interface, and the drafters without modules of their own.

A drafter may run the blocks below its exit on the tokens it reads. Their slow states, keys and values are
then already the model's, and verification resumes at the exit. `exit` 0 means that nothing is computed
ahead: verification starts from the embeddings.
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
    """The drafts of one step.

    Attributes:
        tokens: drafted tokens in order; ints, or lazy (1, 1) arrays if greedy. An empty list makes the step
            one of plain decoding.
        states: slow states h_E (1, n, D) of the pending token and of the drafts that have passed the blocks
            below the exit, in order; empty if the exit is 0.
        q: for each token the probabilities it was drawn from, (V,) each; empty if greedy.
    """

    tokens: list = field(default_factory=list)
    states: list[mx.array] = field(default_factory=list)
    q: list[np.ndarray] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """Number of drafts, the most that can be accepted."""
        return len(self.tokens)

    def take(self, logits: mx.array, sampler: Sampler) -> mx.array:
        """Draft one more token from logits (1, 1, V); return it as the (1, 1) array to read next."""
        if sampler.greedy:  # computed while the next pass is prepared
            self.tokens.append(mx.argmax(logits, axis=-1))
            mx.async_eval(self.tokens[-1])
            return self.tokens[-1]
        self.q.append(sampler.probabilities(logits[0])[0])
        self.tokens.append(sampler.draw(self.q[-1]))
        return as_row(self.tokens[-1])

    def take_certain(self, tokens: list[int], sampler: Sampler, vocabulary: int) -> None:
        """Append deterministic drafts (q is one-hot)."""
        self.tokens += tokens
        if not sampler.greedy:
            self.q += list(np.eye(1, vocabulary, token)[0] for token in tokens)


class Drafter:
    """The interface of a drafter. The decoder calls `begin` once for a text, then in each step `__call__`,
    verifies, and calls `learn`.

    Attributes:
        exit: E, number of blocks that it runs on each token it reads.
        learns: depth of the states passed to `learn`, E or N; None if it needs none.
        threshold: confidence below which it stops drafting; 0 never stops.
    """

    exit = 0
    learns: int | None = None
    threshold = 0.0

    def begin(self, prompt: list[int], capacity: int) -> None:
        """Start a new text; caches start with a capacity of `capacity` tokens."""

    def learn(self, states: mx.array) -> None:
        """Receive the slow states (1, T, D), at depth `learns`, of the tokens just verified: first those
        of the prompt without its last token, then in each step those of the pending token and the
        accepted drafts.
        """

    def look(self, choices: list[int]) -> None:
        """Receive the model's first choices after the extra rows of a tree (tree.py)."""

    def __call__(self, text: list[int], drafts: int, sampler: Sampler, cache: list) -> Draft:
        """Draft tokens after a text; the result is a `Draft` or a `Tree`.

        Args:
            text: prompt and answer; all tokens but the last, the pending one, are verified.
            drafts: maximum number of drafts, at least 1.
            cache: the model's cache with len(text) - 1 verified positions; the blocks below the exit grow by
                the tokens read.

        After a `Tree` (tree.py), `learn` receives the last states, whatever `learns` is; the cache must hold
        the verified positions only.
        """
        raise NotImplementedError


def as_row(token) -> mx.array:
    """A token as an array (1, 1)."""
    return token if isinstance(token, mx.array) else mx.array([[token]])


class Plain(Drafter):
    """Drafts nothing: the decoder is then plain decoding."""

    def __call__(self, text, drafts, sampler, cache):
        return Draft()


class EarlyExit(Drafter):
    """Drafts from the bare residual h_E at the exit (the logit lens).

    LayerSkip (arXiv 2404.16710) reports up to 2.16x on CNN/DM. We implement drafting with the first E
    blocks, sharing their states and keys, and verification with the rest; not its training with layer
    dropout and an early-exit loss.
    """

    def __init__(self, backbone: Backbone, exit: int):
        check_exit(backbone, exit)
        self.backbone, self.exit = backbone, exit

    def _read(self, token: mx.array, cache: list, verified: int, position: int) -> tuple[mx.array, mx.array]:
        """Read one token (1, 1) at a position, with `verified` positions before it: the slow state at the
        exit (1, 1, D), and logits (1, 1, V).
        """
        return self.backbone.read(token, cache, self.exit)

    def __call__(self, text, drafts, sampler, cache):
        draft, token, verified = Draft(), as_row(text[-1]), len(text) - 1
        for ahead in range(drafts):
            h, logits = self._read(token, cache, verified, verified + ahead)
            draft.states.append(h)
            token = draft.take(logits, sampler)
        return draft


class M2R2(EarlyExit):
    """Drafts from the accelerated residual p_E, which approximates the model's last state.

    Verification resumes where drafting left the slow stream (`AcceleratedStream.slow_depth`); that depth,
    not E, is this drafter's `exit`.

    Args:
        exit: E, where p is read; by default the stream's first exit.
        threshold: stop drafting when the probability that all drafts so far are correct, by p_E's own
            probabilities, is below this; 0 always drafts the maximum.
    """

    def __init__(
        self, backbone: Backbone, stream: AcceleratedStream, exit: int | None = None, threshold: float = 0.0
    ):
        self.backbone, self.stream, self.threshold = backbone, stream, threshold
        self.read_at = stream.config.exits[0] if exit is None else exit
        stream.interval(self.read_at)  # raises for an exit that it was not trained for
        self.exit = stream.slow_depth(self.read_at)
        self.learns = backbone.depth if stream.config.carry else None
        self._last = None  # h_N of the newest verified token
        self._before = None  # last state of the previous token: h_N, then the draft's p_E

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
            if not sampler.greedy:  # the probabilities are already computed
                chance *= float(draft.q[-1][draft.tokens[-1]])
                if chance < self.threshold:
                    break
                continue
            # start the next draft before its predecessor's confidence is known, and drop the last draft:
            # faster than a synchronisation for each draft
            before, sure = sure, confidence(logits)
            mx.async_eval(sure)
            if before is not None:
                chance *= before.item()
                if chance < self.threshold:
                    del draft.tokens[-1], draft.states[len(draft.tokens) :]
                    break
        # keep the drafts' keys below the exit; from there on verification writes them
        crop(cache[: self.exit], len(text) - 1 + len(draft.states))
        crop(cache[self.exit : self.read_at], len(text) - 1)
        return draft


@mx.compile
def confidence(logits: mx.array) -> mx.array:
    """Probability of the first choice, from logits (1, 1, V); a scalar."""
    return 1 / fast_exp(logits.astype(mx.float32) - logits.max()).sum()


def check_exit(backbone: Backbone, exit: int) -> None:
    """Raise UserError for an exit that the model does not have."""
    if not 1 <= exit < backbone.depth:
        raise UserError(f"The exit must lie between 1 and {backbone.depth - 1}; got {exit}.")
