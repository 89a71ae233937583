"""Text for training and decoding: corpora, prompt files, self-generated text, streamed text."""

from ..common import on_demand

__getattr__, __dir__ = on_demand(
    __name__,
    {
        "corpus": "code_documents",
        "prompts": "Prompt",
        "rows": "WINDOW windows",
    },
)
