"""The forms of an accelerated block, by name."""

from ..common import Entry, registry

FORMS = registry(
    Entry("block", "the base block with trained changes of its matrices"),
    Entry("attention", "attention to the slow keys and values, and a small FFN"),
    Entry("adapter", "a small FFN only"),
)
