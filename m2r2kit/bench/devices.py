"""The cost model on other machines, with the acceptance measured here.

A roofline model: a pass reads each weight once and does 2 operations with it per position; the slower of the
two determines the time.

    seconds = max(weights x bytes / bandwidth, 2 x weights x positions / peak)

So positions are free up to the ridge, peak x bytes / (2 x bandwidth). Attention over the text, the cache,
kernel launches and other inefficiencies are left out. With few positions real kernels are slower: with MLX on
an Apple GPU, bf16 products with 2 to 16 rows cost twice as much as with one row
(github.com/ml-explore/mlx/issues/4265). The results are bounds and are always marked as computed.
"""

import tomllib
from dataclasses import dataclass

from ..common import ROOT, UserError, missing_advice
from .tables import Table

FILE = ROOT / "data" / "paper" / "devices.toml"  # the figures, with their sources
FORMATS = {"16 bit": 2.0, "4 bit": 0.5}  # bytes a weight
DEAR = 2.0  # v if several positions cost twice as much as one, as in that issue
HEADS = ("machine", "weights", "free positions", "plain step", "c", "v", "speed-up", f"if v = {DEAR:g}")


@dataclass(frozen=True)
class Device:
    """Specification of a machine: `peak` in half-precision FLOP/s, memory `bandwidth` in bytes/s."""

    name: str
    peak: float
    bandwidth: float

    def seconds(self, weights: float, positions: float, bytes_per_weight: float = 2.0) -> float:
        """Time of one pass of `positions` through `weights`."""
        return max(weights * bytes_per_weight / self.bandwidth, 2 * weights * positions / self.peak)

    def ridge(self, bytes_per_weight: float = 2.0) -> float:
        """Number of positions up to which reading the weights takes longer than computing."""
        return self.peak * bytes_per_weight / (2 * self.bandwidth)


@dataclass(frozen=True)
class Shape:
    """Weights that a pass of a model reads: `block` in each of `blocks` blocks, and `head`."""

    blocks: int
    block: int
    head: int

    @classmethod
    def of(cls, config: dict) -> "Shape":
        """From the config.json of a dense llama, without the norms."""
        D, heads = config["hidden_size"], config["num_attention_heads"]
        width = config.get("head_dim") or D // heads
        kv_heads = config.get("num_key_value_heads", heads)
        attention = 2 * D * width * (heads + kv_heads)  # queries and output, keys and values
        block = attention + 3 * D * config["intermediate_size"]
        return cls(config["num_hidden_layers"], block, D * config["vocab_size"])

    @property
    def weights(self) -> int:
        """Weights of a whole pass, without the embedding, of which a token reads one row."""
        return self.blocks * self.block + self.head


LLAMA_7B = Shape.of(  # Touvron et al. 2023, arXiv 2302.13971, table 2; the widths of its config.json
    {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008,
     "num_hidden_layers": 32, "vocab_size": 32000}
)  # fmt: skip


def read() -> list[Device]:
    """The machines of `data/paper/devices.toml`.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        rows = tomllib.loads(FILE.read_text(encoding="utf-8"))["device"]
    except (OSError, ValueError) as error:
        what_to_do = missing_advice(FILE, "restore it from git")
        raise UserError(f"data/paper/{FILE.name} cannot be read ({error}); {what_to_do}") from None
    return [Device(row["name"], row["peak"], row["bandwidth"]) for row in rows]


def draft_and_verify(
    device: Device, shape: Shape, draft_blocks: float, positions: float, bytes_per_weight: float = 2.0
) -> tuple[float, float]:
    """(c, v): costs of one draft and one verification, in plain steps.

    Args:
        draft_blocks: blocks whose weights a draft reads, accelerated blocks included; the head is added.
        positions: g + 1. The last draft has not run the first blocks, so a verification reads all weights.
    """
    plain = device.seconds(shape.weights, 1, bytes_per_weight)
    draft = device.seconds(draft_blocks * shape.block + shape.head, 1, bytes_per_weight)
    return draft / plain, device.seconds(shape.weights, positions, bytes_per_weight) / plain


class DevicesTable(Table):
    """Computed speed-ups of one drafting method, one row per machine and weight format.

    Args:
        parts: measured values from `arms.parts`, of which `tau` and `g` are used.
        shape: of the target model.
        draft_blocks: as for `draft_and_verify`.
    """

    def __init__(self, parts: dict, shape: Shape, draft_blocks: float, devices: list[Device] | None = None):
        self.parts, self.shape, self.draft_blocks = parts, shape, draft_blocks
        devices = read() if devices is None else devices
        super().__init__(
            HEADS,
            [self._row(device, name, size) for device in devices for name, size in FORMATS.items()],
            f"Computed, not measured: {shape.weights / 1e9:.1f} billion weights; "
            f"tau {parts['tau']:.2f} with {parts['g']:.1f} drafts per step, as measured here.",
        )

    def speedup(self, device: Device, bytes_per_weight: float = 2.0, v: float | None = None) -> float:
        """S = tau / (g c + v), with measured tau and g and computed c; v is computed unless given."""
        c, free = draft_and_verify(
            device, self.shape, self.draft_blocks, self.parts["g"] + 1, bytes_per_weight
        )
        v = free if v is None else v
        return self.parts["tau"] / (self.parts["g"] * c + v)

    def _row(self, device: Device, name: str, size: float) -> tuple[str, ...]:
        c, v = draft_and_verify(device, self.shape, self.draft_blocks, self.parts["g"] + 1, size)
        milliseconds = 1000 * device.seconds(self.shape.weights, 1, size)
        numbers = (f"{device.ridge(size):.0f}", f"{milliseconds:.1f} ms", f"{c:.2f}", f"{v:.2f}")
        speeds = (f"{self.speedup(device, size, v):.2f}x" for v in (None, max(v, DEAR)))
        return device.name, name, *numbers, *speeds
