"""Prompt lookup: what followed the last few tokens when they stood in the text before."""

from ...model.backbone import Backbone
from .base import Draft, Drafter


class PromptLookup(Drafter):
    """Drafts what followed an earlier occurrence of the text's last tokens; nothing if there is none.

    Prompt lookup decoding (Saxena 2023, apoorvumang/prompt-lookup-decoding) reports 2-4x, on tasks
    whose answer repeats the input only; we have all of it: n-grams of up to 3 tokens, the longest
    first, and of equals the earliest.

    Args:
        longest: tokens of the longest suffix that is looked up.
    """

    def __init__(self, backbone: Backbone, longest: int = 3):
        self.vocabulary, self.longest = backbone.config["vocab_size"], longest

    def __call__(self, text, drafts, sampler, cache):
        draft = Draft()
        draft.take_certain(lookup(text, self.longest, drafts), sampler, self.vocabulary)
        return draft


def lookup(text: list[int], longest: int, count: int) -> list[int]:
    """Up to `count` tokens that followed the longest suffix (of at most `longest` tokens) which
    occurs before; of several places the first, where most text follows."""
    for n in range(min(longest, len(text) - 1), 0, -1):
        suffix = text[-n:]
        for i in range(len(text) - n):
            if text[i] == suffix[0] and text[i : i + n] == suffix:
                return text[i + n : i + n + count]
    return []
