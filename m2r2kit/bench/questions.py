"""What a run asks of a model: the token ids of all prompts, those of later turns included.

A later turn (MT-Bench has two) comes after an answer. That answer is plain decoding's own, whatever
decodes afterwards, so that all arms are asked the same and stay paired.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ..common import UserError
from ..model.backbone import Backbone
from ..speculation import generate
from ..text.prompts import Prompt


@dataclass(frozen=True)
class Questions:
    """What can be asked.

    Attributes:
        prompts: one for each turn; that of a later turn has the id `ID.2`, `ID.3`, ..
        ids: the token ids of each, with all that was said before it.
        too_long: turns left out because they leave no room in the model's context.
        no_template: later turns left out because the tokenizer cannot say who said what.
    """

    prompts: list[Prompt]
    ids: list[list[int]]
    too_long: int
    no_template: int
    context: int

    @property
    def left_out(self) -> str:
        """What is left out and why, one sentence; empty if nothing is."""
        reasons = []
        if self.too_long:
            reasons.append(
                f"{self.too_long} that leave no room in the model's context of {self.context} tokens"
            )
        if self.no_template:
            reasons.append(f"{self.no_template} that follow an answer, as the tokenizer has no chat template")
        total = len(self.prompts) + self.too_long + self.no_template
        return f"Left out of {total} prompts: {'; '.join(reasons)}." if reasons else ""


def questions(backbone: Backbone, prompts: Iterable[Prompt], max_tokens: int) -> Questions:
    """The token ids of all turns of all prompts, in order.

    Args:
        max_tokens: of each answer that a later turn follows.

    Raises:
        UserError: nothing is left that fits.
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
            except UserError:  # it is too long, and so is all that follows; a file has no empty prompt
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
            f"No prompt leaves room in the model's context of {backbone.context} tokens; choose shorter ones."
        )
    return found
