"""Streaming text: a detokenizer whose segments add up to `tokenizer.decode`, and stop words."""

import re
from collections.abc import Collection, Sequence

from ..common import UserError

WINDOW, CONTEXT = 48, 8  # a window of more tokens is cut to its last CONTEXT tokens
UNKNOWN = "\ufffd"  # replaces bytes that are not a character, or not yet
BYTE = re.compile("<0x[0-9A-F]{2}>")


class Detokenizer:
    """Streams text in segments whose concatenation is `tokenizer.decode` of all tokens.

    A token's text may depend on its neighbours: a character can be split between tokens, a leading space is
    dropped, and byte tokens form a character only together. So a window of tokens is decoded each time, and
    a segment contains only text that later tokens cannot change.

    Args:
        tokenizer: of mlx-lm or transformers.
        eos: end-of-text ids, which have no text.
    """

    def __init__(self, tokenizer, eos: Collection[int] = ()):
        self._tokenizer, self._eos = tokenizer, eos
        self._cleans = _cleans_spaces(tokenizer)
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that are already returned

    def add(self, token: int) -> str:
        """Add a token; returns the text that is now final, which may be empty."""
        if token in self._eos:
            return ""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # an id that pads the vocabulary
            return ""
        self._window.append(token)
        if BYTE.fullmatch(piece):  # a later wrong byte in the run would make all of it undecodable
            return ""
        text = self._tokenizer.decode(self._window)
        end = len(text.rstrip(UNKNOWN))
        if self._cleans:  # decoding drops a space if a punctuation mark follows
            end = min(end, max(0, text.rfind(" ")))
        segment = text[self._given : end]
        self._given = max(self._given, end)
        if end == len(text) and len(self._window) > WINDOW:
            self._window = self._window[-CONTEXT:]
            self._given = len(self._tokenizer.decode(self._window))
        return segment

    def finish(self) -> str:
        """The remaining text."""
        text = self._tokenizer.decode(self._window)
        segment, self._given = text[self._given :], len(text)
        return segment


def _cleans_spaces(tokenizer) -> bool:
    """Whether decoding removes spaces before punctuation; transformers does not do so for BPE."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return type(model).__name__ != "BPE" or getattr(tokenizer, forced, False)


class StopWords:
    """Cuts a streamed text before the first stop word, which may span segments.

    Raises:
        UserError: a stop word is empty.
    """

    def __init__(self, words: Sequence[str] = ()):
        if not all(words):
            raise UserError("A stop word is empty; leave it out.")
        self.words, self._held = tuple(words), ""

    def take(self, segment: str, last: bool = False) -> tuple[str, bool]:
        """Add a segment; returns (text, found).

        `text` ends before the stop word, or before a possible start of one, which is held back. `found` tells
        whether there is a stop word.

        Args:
            last: whether this is the last segment; nothing is then held back.
        """
        if not self.words:
            return segment, False
        text = self._held + segment
        found = [at for at in map(text.find, self.words) if at >= 0]
        if found:
            return text[: min(found)], True
        hold = len(text)
        if not last:
            longest = max(map(len, self.words))
            tails = range(max(0, len(text) - longest), len(text))
            hold = next((i for i in tails if any(w.startswith(text[i:]) for w in self.words)), hold)
        self._held = text[hold:]
        return text[:hold], False
