"""The model families that the kit serves, and where each keeps the parts of a block."""

import importlib
from dataclasses import dataclass

from ..common import UserError


@dataclass(frozen=True)
class Parts:
    """Where a block keeps its parts, by mlx-lm's attribute names.

    `norm_after` marks families (olmo2) that normalise what a sub-layer gives, not what it takes;
    `attention_out` and `ffn_out` are the second norms of those (gemma2) that do both.
    """

    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    ffn: str = "mlp"
    ffn_norm: str = "post_attention_layernorm"
    norm_after: bool = False
    attention_out: str = ""
    ffn_out: str = ""


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: `model_type` in config.json.
        classes: how transformers' classes of the family begin.
        module: mlx-lm's module, if it has another name.
    """

    name: str
    classes: str
    module: str = ""
    moe: bool = False
    parts: Parts = Parts()

    def arguments(self) -> type:
        """mlx-lm's dataclass of what it reads from config.json."""
        from . import mlxlm  # noqa: F401  (the first import of mlx-lm)

        return importlib.import_module(f"mlx_lm.models.{self.module or self.name}").ModelArgs


OLMO2 = Parts(
    attention_norm="post_attention_layernorm", ffn_norm="post_feedforward_layernorm", norm_after=True
)
GEMMA2 = Parts(
    ffn_norm="pre_feedforward_layernorm",
    attention_out="post_attention_layernorm",
    ffn_out="post_feedforward_layernorm",
)
FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral", module="llama"),
        Family("qwen2", "Qwen2"),
        Family("qwen3", "Qwen3"),
        Family("phi3", "Phi3"),
        Family("gemma", "Gemma"),
        Family("gemma2", "Gemma2", parts=GEMMA2),
        Family("olmo2", "Olmo2", parts=OLMO2),
        Family("olmoe", "Olmoe", moe=True),
        Family("qwen3_moe", "Qwen3Moe", moe=True),
        Family("mixtral", "Mixtral", moe=True, parts=Parts(ffn="block_sparse_moe")),
    )
}
DENSE = tuple(name for name, family in FAMILIES.items() if not family.moe)
MOE = tuple(name for name, family in FAMILIES.items() if family.moe)

# Families that are asked for often, and why they are not here.
UNSERVED = {
    "gemma3": "its attention window slides after 512 or 1,024 tokens",
    "gemma3_text": "its attention window slides after 512 or 1,024 tokens",
}


def check_served(config: dict) -> None:
    """Refuse, in one sentence, a model that the kit's view cannot show (config: its config.json)."""
    name = str(config.get("model_type", ""))
    if name not in FAMILIES:
        why = f" ({UNSERVED[name]})" if name in UNSERVED else ""
        raise UserError(f"Models of type '{name}' are not served{why}; use one of {', '.join(DENSE + MOE)}.")
