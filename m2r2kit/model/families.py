"""The supported model families, and the attribute names of their blocks' parts."""

import importlib
from dataclasses import dataclass

from ..common import UserError


@dataclass(frozen=True)
class Parts:
    """mlx-lm's attribute names of a block's parts.

    Attributes:
        norm_after: the family (olmo2) normalises the outputs of its sub-layers, not their inputs.
        attention_out, ffn_out: norms of the outputs, in families (gemma2) that normalise both.
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
    """A model family.

    Attributes:
        name: `model_type` in config.json.
        classes: prefix of its classes in transformers.
        module: mlx-lm's module, if it has another name.
        moe: whether its models are mixtures of experts.
    """

    name: str
    classes: str
    module: str = ""
    moe: bool = False
    parts: Parts = Parts()

    def arguments(self) -> type:
        """mlx-lm's dataclass of the family's settings in config.json."""
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

# Popular families that are not supported, and why.
UNSUPPORTED = {
    "gemma3": "its attention window slides after 512 or 1,024 tokens",
    "gemma3_text": "its attention window slides after 512 or 1,024 tokens",
}


def check_supported(config: dict) -> None:
    """Refuse a model of another family.

    Args:
        config: the model's config.json.

    Raises:
        UserError: its family is not supported; the message lists those that are.
    """
    name = str(config.get("model_type", ""))
    if name not in FAMILIES:
        why = f" ({UNSUPPORTED[name]})" if name in UNSUPPORTED else ""
        names = ", ".join(DENSE + MOE)
        raise UserError(f"Models of type '{name}' are not supported{why}; use one of {names}.")
