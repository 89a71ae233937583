"""What decoding with exits costs, counted whole: blocks, readers, gates, heads and fills.

Counted are multiply-accumulates (MACs), one token at a time; attention's own products with
keys and values are left out, as they depend on the text's length and are few here.
"""

from dataclasses import dataclass, replace

import numpy as np

from ..model.backbone import Backbone
from ..stream.fast_block import matrix_sizes


@dataclass(frozen=True)
class Work:
    """MACs of a token by what they are for.

    Attributes:
        blocks: slow blocks.
        readers: what turns their states into what the head reads.
        gates, heads, fill: deciding, reading out (probes included), keys and values of skipped blocks.
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
    """Of one block."""
    return matrix_sizes(backbone.blocks[0])


def head_macs(backbone: Backbone) -> int:
    return backbone.width * backbone.config["vocab_size"]


def key_value_macs(backbone: Backbone) -> int:
    """Of a block's key and value matrices."""
    attention = backbone.blocks[0][backbone.parts.attention]
    named = {name: w for name, w in attention.named_modules() if name in ("k_proj", "v_proj")}
    return sum(m.weight.size for m in named.values()) or matrix_sizes(attention) // 2


def whole(backbone: Backbone) -> Work:
    """Of a token through all blocks of the model alone."""
    return Work(backbone.depth * block_macs(backbone), 0, 0, head_macs(backbone), 0)


def by_exit(backbone: Backbone, reader, gate, fill, waits: bool = False, use=None) -> list[Work]:
    """Of a token that leaves at each of the J exits, and of one that never does: J + 1 of them.

    Args:
        waits: skipped tokens run along with a later pass: they cost all blocks, and filling what the
            reader looks at.
        use: indices of the exits that are tried; by default all.
    """
    block, head, N, J = block_macs(backbone), head_macs(backbone), backbone.depth, len(reader.exits)
    out = []
    for j in range(J + 1):
        looked = [i for i in (range(J) if use is None else use) if i <= j]
        heads = (len(looked) + (j == J) if gate.probes else 1) * head
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
    """Of an average token; `exits` are the indices of the exits taken, `wasted` the MACs of heads that were
    read at exits where the average token then stayed."""
    share = np.bincount(exits, minlength=len(works)) / len(exits)
    parts = ("blocks", "readers", "gates", "heads", "fill")
    found = Work(
        *(float(sum(s * getattr(w, part) for s, w in zip(share, works, strict=True))) for part in parts)
    )
    return replace(found, heads=found.heads + wasted)
