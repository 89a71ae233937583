"""The one driver: a decoder steps, the driver counts, stops, streams text and returns one result.

    begin    the decoder reads the prompt, all but its last token
    step     it emits one token or more, the first of them after `pending`     (again and again)

Plain decoding, drafts, exits and experts from disk are decoders. `drive` is the only token loop of the kit;
`generate` runs it to its end, and `stream` turns its tokens into text.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from typing import NamedTuple

from .common import UserError
from .model.backbone import Backbone
from .model.cache import FIRST_ROOM
from .model.cpu.threads import decoding
from .text.streaming import Detokenizer, StopWords


class Emitted(NamedTuple):
    """What a decoder emits at once.

    Attributes:
        tokens: one or more, in order; nothing follows an end of text.
        drafted: drafts that were offered.
        accepted: how many of `tokens`, from the first, were drafts.
        depth: blocks that the token ran, where that differs from token to token.
    """

    tokens: list[int]
    drafted: int = 0
    accepted: int = 0
    depth: int | None = None


class Decoder:
    """What the driver drives.

    Attributes:
        backbone: gives the context length and the ends of text.
        work: what a decoder of streamed experts counts, for `Generation.experts`; None for the others.
    """

    backbone: Backbone
    work: object | None = None
    _run: object | None = None  # the result of the text that it decodes now

    def begin(self, prompt: list[int], capacity: int) -> None:
        """Forget the last text, and read all of a prompt but its last token.

        Args:
            prompt: token ids, at least one.
            capacity: positions to allocate at first; a longer text grows its cache.
        """
        raise NotImplementedError

    def step(self, pending: int, left: int) -> Emitted:
        """Emit what follows.

        Args:
            pending: the newest token of the text, which is not in the cache yet.
            left: emit at most so many tokens, at least 1.
        """
        raise NotImplementedError

    def threads(self) -> AbstractContextManager:
        """How threads are set while it steps."""
        return decoding(self.backbone.matrix_bytes)


@dataclass
class Generation:
    """What came out of one prompt; as a string, its text.

    Attributes:
        tokens: emitted ids, the end of text included if it was reached.
        from_draft: for each token, whether it was a draft.
        drafted: drafts offered in each step (a drafter may offer fewer than it is asked for).
        accepted: drafts accepted in each step (those after an end of text do not count).
        depth: for each token, the blocks that it ran, where a decoder with exits says so; else empty.
        seconds: from the first pass over the prompt to the last token.
        prefill_seconds: those of the first pass, over all of the prompt but its last token.
        stopped: `eos`, `length` or `stop` (a stop word); None while it is being generated.
        text: the text without the stop word, where text was asked for.
        experts: what reading experts from disk took (`ExpertWork`); None for other decoders.
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
        """Passes that emitted tokens: with drafts, verifications."""
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
        max_tokens: emit at most this many (and no more than the context holds).
        out: an empty result, filled while the steps are made; when the last step is yielded, it says why the
            text stops.
        given: tokens that follow in the place of those that are emitted, to compare with them. Only
            for decoders that emit one token a step and compute nothing ahead.

    Raises:
        UserError: an empty or over-long prompt, or no token asked for; another text was begun with this
            decoder before this one was finished.
    """
    if max_tokens < 1:
        raise UserError(f"At least one token must be asked for; got {max_tokens}.")
    backbone, out = decoder.backbone, Generation() if out is None else out
    limit, eos = min(max_tokens, backbone.room_after(prompt)), backbone.eos
    begun = time.perf_counter()
    try:
        decoder._run = out
        decoder.begin(prompt, len(prompt) + min(limit, FIRST_ROOM))
        out.prefill_seconds, out.experts = time.perf_counter() - begun, decoder.work
        pending, tokens = prompt[-1], out.tokens
        with decoder.threads():
            while out.stopped is None:
                if decoder._run is not out:
                    raise UserError("This decoder has begun another text; finish one before the next.")
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
    """Continue a prompt to its end; arguments and errors as of `drive`.

    Args:
        on_tokens: called after each step with the new tokens and which of them were drafts.
    """
    out = Generation()
    for step in drive(decoder, prompt, max_tokens, out, given):
        if on_tokens:
            on_tokens(step.tokens, out.from_draft[-len(step.tokens) :])
    return out


class Segment(NamedTuple):
    """One token and the text that became certain with it, which may be empty, or of tokens before it.

    Attributes:
        depth: blocks that the token ran, where a decoder with exits says so.
        stopped: of the last piece, why the text stops; None of all others.
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
    """Continue a prompt token by token, with text; arguments and errors as of `drive`.

    The texts of all pieces are `tokenizer.decode` of the tokens, up to the first stop word.

    Args:
        stop: words that end the text; neither they nor what follows is part of it.
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
                if found:  # what the step emitted after it is not part of the text
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
