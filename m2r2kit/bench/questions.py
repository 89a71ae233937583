"""The token ids of all prompts of a run, including later turns.

A later turn (MT-Bench has two) follows an answer. That answer is always from plain decoding, so that all arms
get the same prompts and stay paired.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ..common import UserError
from ..model.backbone import Backbone, TooLong
from ..speculation import generate
from ..text.prompts import Prompt


@dataclass(frozen=True)
class Questions:
    """The prompts of a run.

    Attributes:
        prompts: one per turn; a later turn has the id `ID.2`, `ID.3`, ..
        ids: the token ids of each, with the conversation before it.
        too_long: turns left out because they exceed the capacity of the model's context.
        no_template: later turns left out because the tokenizer has no chat template.
    """

    prompts: list[Prompt]
    ids: list[list[int]]
    too_long: int
    no_template: int
    context: int

    @property
    def left_out(self) -> str:
        """One sentence on the turns left out; empty if there are none."""
        reasons = []
        if self.too_long:
            reasons.append(f"{self.too_long} that exceed the model's context of {self.context} tokens")
        if self.no_template:
            reasons.append(f"{self.no_template} that follow an answer, as the tokenizer has no chat template")
        total = len(self.prompts) + self.too_long + self.no_template
        return f"Left out of {total} prompts: {'; '.join(reasons)}." if reasons else ""


def questions(backbone: Backbone, prompts: Iterable[Prompt], max_tokens: int) -> Questions:
    """The token ids of all turns of all prompts, in order.

    Args:
        max_tokens: of each answer before a later turn.

    Raises:
        UserError: no prompt fits, or the chat template fails.
    """
    kept, ids, too_long, no_template = [], [], 0, 0
    for prompt in prompts:
        turns, said = (prompt.prompt, *prompt.more_turns), []
        for n, turn in enumerate(turns, 1):
            if said and not backbone.tokenizer.has_chat_template:
                no_template += len(turns) - n + 1
                break
            try:
                asked = backbone.encode(turn, before=said)
            except TooLong:  # and so are all later turns
                too_long += len(turns) - n + 1
                break
            kept.append(Prompt(prompt.id if n == 1 else f"{prompt.id}.{n}", turn, prompt.kind))
            ids.append(asked)
            if n < len(turns):
                answer = generate(backbone, asked, max_tokens=max_tokens).tokens
                said += [turn.strip(), backbone.decode(answer)]
    found = Questions(kept, ids, too_long, no_template, backbone.context)
    if not kept:
        raise UserError(
            f"No prompt fits in the model's context of {backbone.context} tokens; choose shorter ones."
        )
    return found
