"""The driver: a decoder emits tokens; the driver counts them, stops, streams text and returns the result.

    begin    the decoder reads the prompt, all but its last token
    step     it emits one or more tokens, starting after `pending`     (repeated)

Plain decoding, drafts, early exits and experts from disk are decoders. `drive` is the kit's only token loop.
`generate` runs it to the end, and `stream` turns its tokens into text.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from numbers import Integral
from typing import NamedTuple

from .common import UserError
from .model.backbone import Backbone
from .model.cache import FIRST_CAPACITY
from .model.cpu.threads import decoding
from .text.streaming import Detokenizer, StopWords


class Emitted(NamedTuple):
    """The output of one step of a decoder.

    Attributes:
        tokens: one or more token ids, in order; an end-of-text token is the last one.
        drafted: number of drafts offered.
        accepted: number of leading `tokens` that are drafts.
        depth: number of blocks that the token ran, for decoders with exits.
    """

    tokens: list[int]
    drafted: int = 0
    accepted: int = 0
    depth: int | None = None


class Decoder:
    """The interface of all decoders.

    Attributes:
        backbone: the model, with its context length and end-of-text tokens.
        work: counters of a decoder that reads experts from disk, for `Generation.experts`; else None.
    """

    backbone: Backbone
    work: object | None = None
    _run: object | None = None  # the result of the current run

    def begin(self, prompt: list[int], capacity: int) -> None:
        """Start a new text: reset all state and read the prompt without its last token.

        Args:
            prompt: token ids, at least one.
            capacity: initial cache capacity in positions; the cache grows when needed.
        """
        raise NotImplementedError

    def step(self, pending: int, left: int) -> Emitted:
        """Emit the next tokens.

        Args:
            pending: the newest token of the text, which is not in the cache yet.
            left: the most tokens to emit, at least 1.
        """
        raise NotImplementedError

    def threads(self) -> AbstractContextManager:
        """A context that sets up threads while the decoder steps."""
        return decoding(self.backbone.matrix_bytes)


@dataclass
class Generation:
    """The result for one prompt; `str()` of it is the text.

    Attributes:
        tokens: emitted token ids, with the end-of-text token if it was reached.
        from_draft: for each token, whether it was a draft.
        drafted: number of drafts offered in each step (a drafter may offer fewer than requested).
        accepted: number of drafts accepted in each step (those after an end of text do not count).
        depth: for each token, the number of blocks that it ran, for decoders with exits; else empty.
        seconds: from the start of the prompt's first pass to the last token.
        prefill_seconds: of the first pass, over the prompt without its last token.
        stopped: `eos`, `length` or `stop` (a stop word); None while generating.
        text: the text without the stop word; empty if only tokens were requested.
        experts: cost of reading experts from disk (`ExpertWork`); None for other decoders.
    """

    tokens: list[int] = field(default_factory=list)
    from_draft: list[bool] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    stopped: str | None = None
    text: str = ""
    experts: object | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def steps(self) -> int:
        """Number of decoding steps; with drafts, each is one verification."""
        return len(self.drafted)


def drive(
    decoder: Decoder,
    prompt: list[int],
    max_tokens: int = 128,
    out: Generation | None = None,
    given: Sequence[int] | None = None,
) -> Iterator[Emitted]:
    """Continue a prompt step by step.

    Args:
        prompt: token ids, at least one.
        max_tokens: the most tokens to emit; the model's context is a limit too.
        out: an empty result, which is filled step by step; `stopped` is set when the last step is yielded.
        given: teacher forcing: tokens that continue the text in place of the emitted ones. Only for decoders
            that emit one token a step and compute nothing ahead.

    Yields:
        the output of each step.

    Raises:
        UserError: the prompt is empty or too long, `max_tokens` is not a whole number from 1, or this
            decoder has begun another text meanwhile.
    """
    if not isinstance(max_tokens, Integral):
        raise UserError(f"max_tokens must be a whole number; got {max_tokens!r}.")
    if max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1; got {max_tokens}.")
    backbone, out = decoder.backbone, Generation() if out is None else out
    limit, eos = min(max_tokens, backbone.max_new_tokens(prompt)), backbone.eos
    begun = time.perf_counter()
    try:
        decoder._run = out
        decoder.begin(prompt, len(prompt) + min(limit, FIRST_CAPACITY))
        out.prefill_seconds, out.experts = time.perf_counter() - begun, decoder.work
        pending, tokens = prompt[-1], out.tokens
        with decoder.threads():
            while out.stopped is None:
                if decoder._run is not out:
                    raise UserError("This decoder has begun another text; finish one text before the next.")
                step = decoder.step(pending, limit - len(tokens))
                new, accepted = step.tokens, step.accepted
                tokens += new
                out.from_draft += [i < accepted for i in range(len(new))]
                out.drafted.append(step.drafted)
                out.accepted.append(accepted)
                if step.depth is not None:
                    out.depth.append(step.depth)
                pending = tokens[-1] if given is None else given[len(tokens) - 1]
                if pending in eos:
                    out.stopped = "eos"
                elif len(tokens) == limit:
                    out.stopped = "length"
                yield step
    finally:
        out.seconds = time.perf_counter() - begun


def generate(
    decoder: Decoder,
    prompt: list[int],
    max_tokens: int = 128,
    on_tokens: Callable[[list[int], list[bool]], None] | None = None,
    given: Sequence[int] | None = None,
) -> Generation:
    """Continue a prompt and return the result; other arguments and errors as in `drive`.

    Args:
        on_tokens: called after each step with the new tokens and, for each, whether it was a draft.
    """
    out = Generation()
    for step in drive(decoder, prompt, max_tokens, out, given):
        if on_tokens:
            on_tokens(step.tokens, out.from_draft[-len(step.tokens) :])
    return out


class Segment(NamedTuple):
    """One token and the text that is final with it.

    Attributes:
        text: may be empty, or include text of earlier tokens.
        depth: number of blocks that the token ran, for decoders with exits.
        stopped: why the text stops, in the last segment; else None.
    """

    text: str
    token: int
    from_draft: bool
    depth: int | None = None
    stopped: str | None = None


def stream(
    decoder: Decoder,
    prompt: list[int],
    max_tokens: int = 128,
    stop: Sequence[str] = (),
    out: Generation | None = None,
) -> Iterator[Segment]:
    """Continue a prompt and stream its text, one segment a token; other arguments and errors as in `drive`.

    The concatenated segments equal `tokenizer.decode` of the tokens, up to the first stop word.

    Args:
        stop: words that end the text; the text stops before the first of them.
    """
    out = Generation() if out is None else out
    backbone, words = decoder.backbone, StopWords(stop)
    detokenizer = Detokenizer(backbone.tokenizer, backbone.eos)
    with closing(drive(decoder, prompt, max_tokens, out)) as run:
        for step in run:
            first, count = len(out.tokens) - len(step.tokens), len(out.tokens)
            for n, token in enumerate(step.tokens, first + 1):
                ends = out.stopped is not None and n == count
                segment = detokenizer.add(token) + (detokenizer.finish() if ends else "")
                segment, found = words.take(segment, ends)
                out.text += segment
                if found:  # drop what the step emitted after the stop word
                    out.stopped, ends, count = "stop", True, n
                    for each in (out.tokens, out.from_draft, out.depth):
                        del each[n:]
                    out.accepted[-1] = min(out.accepted[-1], n - first)
                    run.close()
                yield Segment(
                    segment, token, n - first <= step.accepted, step.depth, out.stopped if ends else None
                )
                if found:
                    return


def until_end(tokens: list[int], eos: set[int]) -> list[int]:
    """Tokens up to the first end of text, included."""
    for i, token in enumerate(tokens):
        if token in eos:
            return tokens[: i + 1]
    return tokens
