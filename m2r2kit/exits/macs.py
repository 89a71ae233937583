"""The complete cost of decoding with exits: blocks, readers, gates, heads and fills.

The unit is multiply-accumulates (MACs) for each token. Attention's products with keys and values are left
out: they depend on the length of the text and are small here.
"""

from dataclasses import dataclass, replace

import numpy as np

from ..model.backbone import Backbone
from ..stream.fast_block import matrix_sizes


@dataclass(frozen=True)
class Work:
    """MACs of a token by purpose.

    Attributes:
        blocks: slow blocks.
        readers: mapping their states to what the head reads.
        gates: exit decisions, without heads.
        heads: the head, once for each evaluation.
        fill: keys and values of skipped blocks.
    """

    blocks: float
    readers: float
    gates: float
    heads: float
    fill: float

    @property
    def total(self) -> float:
        return self.blocks + self.readers + self.gates + self.heads + self.fill


def block_macs(backbone: Backbone) -> int:
    """MACs of one block."""
    return matrix_sizes(backbone.blocks[0])


def head_macs(backbone: Backbone) -> int:
    """MACs of the head."""
    return backbone.width * backbone.config["vocab_size"]


def key_value_macs(backbone: Backbone) -> int:
    """MACs of a block's key and value matrices."""
    attention = backbone.blocks[0][backbone.parts.attention]
    named = {name: w for name, w in attention.named_modules() if name in ("k_proj", "v_proj")}
    return sum(m.weight.size for m in named.values()) or matrix_sizes(attention) // 2


def whole(backbone: Backbone) -> Work:
    """The work of one token through all blocks of the plain model."""
    return Work(backbone.depth * block_macs(backbone), 0, 0, head_macs(backbone), 0)


def by_exit(backbone: Backbone, reader, gate, fill, waits: bool = False, use=None) -> list[Work]:
    """The work of a token for each exit taken, J of them, and for none: J + 1 results.

    Args:
        waits: skipped tokens are deferred to a later pass: they cost all blocks, and the fill of the blocks
            that the reader reads.
        use: indices of the exits to try; by default all.
    """
    block, head, N, J = block_macs(backbone), head_macs(backbone), backbone.depth, len(reader.exits)
    out = []
    for j in range(J + 1):
        looked = [i for i in (range(J) if use is None else use) if i <= j]
        heads = (len(looked) + (j == J) if gate.needs_head else 1) * head
        filled = 0
        if j < J:
            seen = reader.reads if waits or gate.monotone else range(N)
            blocks = [l for l in range(reader.starts[j], N) if l in seen]
            filled = sum(fill.macs(l, j) + key_value_macs(backbone) for l in blocks)
        slow = reader.starts[j] if j < J and not waits else N
        readers, gates = (sum(map(part.macs, looked)) for part in (reader, gate))
        out.append(Work(slow * block, readers, gates, heads, filled))
    return out


def mean(works: list[Work], exits: np.ndarray, wasted: float = 0.0) -> Work:
    """The work of an average token.

    Args:
        exits: index of the exit that each token took.
        wasted: MACs a token of heads evaluated at exits where the token stayed.
    """
    share = np.bincount(exits, minlength=len(works)) / len(exits)
    parts = ("blocks", "readers", "gates", "heads", "fill")
    found = Work(
        *(float(sum(s * getattr(w, part) for s, w in zip(share, works, strict=True))) for part in parts)
    )
    return replace(found, heads=found.heads + wasted)
