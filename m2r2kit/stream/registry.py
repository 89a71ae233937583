"""What an accelerated block may compute, by name."""

from ..common import Entry, registry

FORMS = registry(
    Entry("block", "the base block with a change of its matrices"),
    Entry("attention", "attention to the slow keys and values, and a small FFN of its own"),
    Entry("adapter", "a small FFN of its own"),
)
