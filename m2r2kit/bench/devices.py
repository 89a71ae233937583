"""The acceptance measured here, put through the cost model on machines that are not here.

A roofline: a pass reads each weight once and does 2 operations with it for each row, and takes as
long as the slower of the two.

    seconds = max(weights x bytes / bandwidth, 2 x weights x rows / peak)

So rows are free up to the ridge, peak x bytes / (2 x bandwidth). Attention over the text, the cache,
launches and all that keeps a kernel from its machine's best are left out; with few rows real kernels do
worse (of MLX on an Apple GPU, products with 2 to 16 rows of bf16 were measured at twice the cost of one row:
github.com/ml-explore/mlx/issues/4265). So what comes out is a bound, and it is called computed wherever it
is shown.
"""

import tomllib
from dataclasses import dataclass

from ..common import ROOT, UserError, missing_advice
from .tables import Table

FILE = ROOT / "data" / "paper" / "devices.toml"  # the figures, with their sources
FORMATS = {"16 bit": 2.0, "4 bit": 0.5}  # bytes a weight
DEAR = 2.0  # v where several rows cost twice one, as that issue has it
HEADS = ("machine", "weights", "free positions", "plain step", "c", "v", "speed-up", f"if v = {DEAR:g}")


@dataclass(frozen=True)
class Device:
    """A machine on paper: `peak` in FLOP/s of half precision, `bandwidth` in bytes/s."""

    name: str
    peak: float
    bandwidth: float

    def seconds(self, weights: float, rows: float, bytes_per_weight: float = 2.0) -> float:
        """Of one pass of so many rows through so many weights."""
        return max(weights * bytes_per_weight / self.bandwidth, 2 * weights * rows / self.peak)

    def ridge(self, bytes_per_weight: float = 2.0) -> float:
        """Rows up to which reading the weights takes longer than computing with them."""
        return self.peak * bytes_per_weight / (2 * self.bandwidth)


@dataclass(frozen=True)
class Shape:
    """How many weights of a model a pass reads: `blocks` of them, each of `block` weights, and the head."""

    blocks: int
    block: int
    head: int

    @classmethod
    def of(cls, config: dict) -> "Shape":
        """From the config.json of a dense llama; norms are too small to count."""
        D, heads = config["hidden_size"], config["num_attention_heads"]
        width = config.get("head_dim") or D // heads
        kv_heads = config.get("num_key_value_heads", heads)
        attention = 2 * D * width * (heads + kv_heads)  # queries and output, keys and values
        block = attention + 3 * D * config["intermediate_size"]
        return cls(config["num_hidden_layers"], block, D * config["vocab_size"])

    @property
    def weights(self) -> int:
        """Of a whole pass. The table of embeddings is not among them: a token reads one line of it."""
        return self.blocks * self.block + self.head


LLAMA_7B = Shape.of(  # Touvron et al. 2023, arXiv 2302.13971, table 2; the widths of its config.json
    {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008,
     "num_hidden_layers": 32, "vocab_size": 32000}
)  # fmt: skip


def read() -> list[Device]:
    """The machines of `data/paper/devices.toml`."""
    try:
        rows = tomllib.loads(FILE.read_text(encoding="utf-8"))["device"]
    except (OSError, ValueError) as error:
        what_to_do = missing_advice(FILE, "restore it from git")
        raise UserError(f"data/paper/{FILE.name} cannot be read ({error}); {what_to_do}") from None
    return [Device(row["name"], row["peak"], row["bandwidth"]) for row in rows]


def draft_and_verify(
    device: Device, shape: Shape, draft_blocks: float, rows: float, bytes_per_weight: float = 2.0
) -> tuple[float, float]:
    """(c, v): one draft and one verification, in plain steps.

    Args:
        draft_blocks: blocks whose weights a draft reads, its own ones included; the head comes on top.
        rows: g + 1. The last draft has not been through the first blocks, so a verification reads all.
    """
    plain = device.seconds(shape.weights, 1, bytes_per_weight)
    draft = device.seconds(draft_blocks * shape.block + shape.head, 1, bytes_per_weight)
    return draft / plain, device.seconds(shape.weights, rows, bytes_per_weight) / plain


class DevicesTable(Table):
    """Computed speed-ups of one way of drafting, a machine and a format a row.

    Args:
        parts: what was measured of the arm, from `arms.parts`: of it `tau` and `g` are used.
        shape: of the model that it is computed for.
        draft_blocks: as for `draft_and_verify`.
    """

    def __init__(self, parts: dict, shape: Shape, draft_blocks: float, devices: list[Device] | None = None):
        self.parts, self.shape, self.draft_blocks = parts, shape, draft_blocks
        devices = read() if devices is None else devices
        super().__init__(
            HEADS,
            [self._row(device, name, size) for device in devices for name, size in FORMATS.items()],
            f"Computed, not measured: {shape.weights / 1e9:.1f} billion weights; "
            f"tau {parts['tau']:.2f} with {parts['g']:.1f} drafts a step, as measured here.",
        )

    def speedup(self, device: Device, bytes_per_weight: float = 2.0, v: float | None = None) -> float:
        """S = tau / (g c + v), with the measured tau and g, and c and v as computed or as given."""
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
