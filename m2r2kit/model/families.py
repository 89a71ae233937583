"""The model families that the kit serves, and where each keeps the parts of a block."""

from dataclasses import dataclass

from ..common import UserError

DENSE = ("llama", "qwen3", "phi3", "gemma", "olmo2")
MOE = ("olmoe", "qwen3_moe", "mixtral")


@dataclass(frozen=True)
class Parts:
    """Where a block keeps its parts, by mlx-lm's attribute names.

    `norm_after` marks families (olmo2) that normalise what a sub-layer gives, not what it takes.
    """

    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    ffn: str = "mlp"
    ffn_norm: str = "post_attention_layernorm"
    norm_after: bool = False


PARTS = {
    "olmo2": Parts(
        attention_norm="post_attention_layernorm", ffn_norm="post_feedforward_layernorm", norm_after=True
    ),
    "mixtral": Parts(ffn="block_sparse_moe"),
}


def check_served(config: dict) -> None:
    """Refuse, in one sentence, a model that this view cannot show (config: its config.json)."""
    family = config.get("model_type", "")
    if family not in DENSE + MOE:
        raise UserError(f"Models of type '{family}' are not served; use one of {', '.join(DENSE + MOE)}.")
    if any(kind == "sliding_attention" for kind in config.get("layer_types") or ()):
        raise UserError("This model slides its attention window, and a rolled cache cannot be cut back.")
