"""Text from tokens as they come: segments that add up to the tokenizer's own decoding, and stop words."""

import re
from collections.abc import Collection, Sequence

from ..common import UserError

WINDOW, CONTEXT = 48, 8  # tokens that are decoded at once at most, and that are kept before new ones
UNKNOWN = "\ufffd"  # stands for bytes that are no character, or not yet
BYTE = re.compile("<0x[0-9A-F]{2}>")


class Detokenizer:
    """Segments of text whose concatenation is `tokenizer.decode` of all tokens.

    A token's text may depend on its neighbours: characters are split between tokens, a leading space is
    dropped, a run of single bytes is a character or none. So a window of tokens is decoded, and given out is
    what no later token can change.

    Args:
        tokenizer: of mlx-lm or transformers.
        eos: ids that end a text; they have no text of their own.
    """

    def __init__(self, tokenizer, eos: Collection[int] = ()):
        self._tokenizer, self._eos = tokenizer, eos
        self._cleans = _cleans_spaces(tokenizer)
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that were given out

    def add(self, token: int) -> str:
        """The text that is certain now; often of this token, sometimes empty."""
        if token in self._eos:
            return ""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # an id that pads the vocabulary
            return ""
        self._window.append(token)
        if BYTE.fullmatch(piece):  # one wrong byte later in a run of them, and none of it is a character
            return ""
        text = self._tokenizer.decode(self._window)
        end = len(text.rstrip(UNKNOWN))
        if self._cleans:  # a space may go when the next word is known to be a full stop
            end = min(end, max(0, text.rfind(" ")))
        segment = text[self._given : end]
        self._given = max(self._given, end)
        if end == len(text) and len(self._window) > WINDOW:
            self._window = self._window[-CONTEXT:]
            self._given = len(self._tokenizer.decode(self._window))
        return segment

    def finish(self) -> str:
        """The rest of the text."""
        text = self._tokenizer.decode(self._window)
        segment, self._given = text[self._given :], len(text)
        return segment


def _cleans_spaces(tokenizer) -> bool:
    """Whether decoding takes out spaces before punctuation; transformers refuses that for BPE."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return type(model).__name__ != "BPE" or getattr(tokenizer, forced, False)


class StopWords:
    """Cuts a text before the first of some words, however its segments divide them.

    Raises:
        UserError: one of them is empty.
    """

    def __init__(self, words: Sequence[str] = ()):
        if not all(words):
            raise UserError("A stop word is empty; leave it out.")
        self.words, self._held = tuple(words), ""

    def take(self, segment: str, last: bool = False) -> tuple[str, bool]:
        """(The text up to a stop word, or up to what may become one; whether there was one).

        Args:
            last: nothing follows this segment.
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
