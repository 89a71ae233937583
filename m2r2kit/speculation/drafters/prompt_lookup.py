"""Prompt lookup: drafts the tokens that followed the same n-gram earlier in the text."""

from ...model.backbone import Backbone
from .base import Draft, Drafter


class PromptLookup(Drafter):
    """Drafts the tokens that followed an earlier occurrence of the text's last tokens; none if there is no
    such occurrence.

    Prompt lookup decoding (Saxena 2023, apoorvumang/prompt-lookup-decoding) reports 2-4x, on tasks whose
    answer repeats the input only. We implement all of it: n-grams of up to 3 tokens, the longest first, and
    the earliest of equal matches.

    Args:
        longest: maximum length of the suffix to look up, in tokens.
    """

    def __init__(self, backbone: Backbone, longest: int = 3):
        self.vocabulary, self.longest = backbone.config["vocab_size"], longest

    def __call__(self, text, drafts, sampler, cache):
        draft = Draft()
        draft.take_certain(lookup(text, self.longest, drafts), sampler, self.vocabulary)
        return draft


def lookup(text: list[int], longest: int, count: int) -> list[int]:
    """Up to `count` tokens that followed an earlier occurrence of the longest suffix (at most `longest`
    tokens); of several occurrences the first, which has the most text after it.
    """
    for n in range(min(longest, len(text) - 1), 0, -1):
        suffix = text[-n:]
        for i in range(len(text) - n):
            if text[i] == suffix[0] and text[i : i + n] == suffix:
                return text[i + n : i + n + count]
    return []
