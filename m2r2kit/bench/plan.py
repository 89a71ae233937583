"""Compute what streaming gives for a model on a machine: bytes per token, I/C, a bound, a budget.

    B = blocks x k x bytes of an expert            bytes of the experts of a token
    C = (other weights + B) / memory bandwidth     lower bound of a token's time with all experts in memory
    I = (1 - h) B / disk bandwidth                 h: share of B that is in memory
    C + I  on demand        max(C, I)  ahead of time, if every prediction is right and in time

These are bounds: real kernels and reads are slower, and `check` compares them with a published system.
Without a trace, h is the share of all experts that the budget holds (random routing); a trace of the model
gives the hit rate of a real cache (`simulate.py`).
"""

from dataclasses import dataclass

from ..experts.policies import LRU
from ..experts.residency import Residency
from ..experts.simulate import replay
from ..experts.trace import Trace

GROUP = 64  # weights that share a 16-bit scale and bias in mlx-lm's quantization


@dataclass(frozen=True)
class Card:
    """Specification of a mixture-of-experts model.

    Attributes:
        blocks, experts, top_k: blocks, experts per block, experts per token.
        width, expert_width: of the hidden state, of an expert's FFN.
        others: number of weights outside the routed experts; all of them run for each token.
    """

    name: str
    blocks: int
    experts: int
    top_k: int
    width: int
    expert_width: int
    others: float
    source: str

    def expert_bytes(self, bits: int) -> float:
        """Bytes of one expert at `bits` per weight, with scales and biases."""
        return 3 * self.width * self.expert_width * bytes_of_weight(bits)

    def token_bytes(self, bits: int, top_k: int | None = None) -> float:
        """B, the bytes of a token's experts."""
        return self.blocks * (top_k or self.top_k) * self.expert_bytes(bits)

    def all_bytes(self, bits: int) -> float:
        """Bytes of all experts."""
        return self.blocks * self.experts * self.expert_bytes(bits)


CARDS = (
    Card("OLMoE-1B-7B", 16, 64, 8, 2048, 1024, 0.48e9,
         "config.json of allenai/OLMoE-1B-7B-0924; 6.92e9 weights in all (arXiv 2409.02060)"),
    Card("Qwen3-30B-A3B", 48, 128, 8, 2048, 768, 1.54e9,
         "config.json of Qwen/Qwen3-30B-A3B; 30.5e9 weights in all (its model card)"),
    Card("Qwen3.5-397B-A17B", 60, 512, 10, 4096, 1024, 9.8e9,
         "CLAUDE.md of danveloper/flash-moe, commit 3601d41; others: its 5.5 GB in 4 bit"),
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Specification of a machine: bytes/s of its disk and memory, bytes of memory."""

    name: str
    disk: float
    memory_speed: float
    memory: float
    source: str


MACHINES = (
    Machine("MacBook Pro, M3 Max", 17.5e9, 400e9, 48e9,
            "disk: danveloper/flash-moe (sequential); memory: Apple's technical specifications"),
    Machine("MacBook Air, M4", 2.4e9, 120e9, 32e9,
            "disk: srcterm/streamlx; memory: Apple's technical specifications"),
    Machine("Mac mini, M2", 1.5e9, 100e9, 16e9,
            "disk: carloslfu/slotstream; memory: Apple's technical specifications"),
)  # fmt: skip
FREE = 0.7  # share of the memory available to a model; the system and the text need the rest


def bytes_of_weight(bits: int) -> float:
    """Bytes per weight, with scale and bias if quantized."""
    return bits / 8 if bits >= 16 else (bits + 32 / GROUP) / 8


@dataclass(frozen=True)
class Plan:
    """The bounds for a model on a machine.

    Attributes:
        share: share of all experts that the budget (bytes) holds; `hit`: share of B that is then in memory.
        compute, read: C and I, in seconds per token.
        on_demand, ahead: upper bounds in tokens/s.
        why: what limits the budget.
    """

    share: float
    budget: float
    hit: float
    compute: float
    read: float
    on_demand: float
    ahead: float
    why: str

    @property
    def ratio(self) -> float:
        """I / C."""
        return self.read / self.compute

    @property
    def bound(self) -> float:
        """(C + I) / max(C, I)."""
        return (self.compute + self.read) / max(self.compute, self.read)


def plan(card: Card, machine: Machine, bits: int = 4, hits: list[float] | None = None) -> Plan | None:
    """The smallest budget whose reads are hidden by computing, otherwise all available memory.

    Args:
        bits: per weight.
        hits: h with 1, 2, .. E slots per block (`hits_of_trace`); by default that of random routing.

    Returns:
        None if one token's experts do not fit beside the other weights.
    """
    E, B = card.experts, card.token_bytes(bits)
    hits = hits or [slots / E for slots in range(1, E + 1)]
    others = card.others * bytes_of_weight(bits)
    free = FREE * machine.memory - others
    most = min(E, int(free // (card.all_bytes(bits) / E)))
    if most < card.top_k:
        return None
    compute = (others + B) / machine.memory_speed
    reads = {slots: (1 - hits[slots - 1]) * B / machine.disk for slots in range(card.top_k, most + 1)}
    slots = next((s for s, read in reads.items() if read <= compute), most)
    why = "reads hide" if reads[slots] <= compute else "memory ends"
    read = reads[slots]
    return Plan(
        slots / E, slots / E * card.all_bytes(bits), hits[slots - 1], compute, read,
        1 / (compute + read), 1 / max(compute, read), why,
    )  # fmt: skip


def hits_of_trace(trace: Trace) -> list[float]:
    """The hit rate h of an LRU cache with 1, 2, .. E slots per block on a recorded run."""
    found = []
    for slots in range(1, trace.experts + 1):
        if slots < trace.top_k:
            found.append(0.0)
            continue
        counts = replay(trace, Residency(trace.blocks, trace.experts, trace.top_k, slots, LRU))
        found.append(counts.resident / max(1, counts.accesses))
    return found


# --- comparison with published figures -------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A published figure and the value computed here."""

    what: str
    published: float
    computed: float
    unit: str
    note: str = ""


def check() -> list[Check]:
    """Compare with the figures claimed by Flash-MoE (danveloper/flash-moe, CLAUDE.md and results, commit
    3601d41): Qwen3.5-397B-A17B with 4 of the 10 experts, on a MacBook Pro with an M3 Max."""
    card, machine = CARDS[2], MACHINES[0]
    B, small = card.token_bytes(4, 4), card.token_bytes(2, 4)
    layer_read, layer = 2.41e-3, 4.28e-3  # seconds of a layer: its reads, all of it
    serial = 1 / (card.blocks * layer)
    overlapped = 1 / (card.blocks * max(layer_read, layer - layer_read))
    return [
        Check("bytes of an expert, 4 bit", 7_077_888, card.expert_bytes(4), "B"),
        Check("bytes per token, 4 bit", 1.70e9, B, "B"),
        Check("bytes per token, 2 bit", 943e6, small, "B"),
        Check("tokens/s, reads alone at the disk's 17.5 GB/s", 4.36, machine.disk / B, "tok/s",
              "an upper bound; they reach less than half of it"),
        Check("tokens/s, reads and computing in sequence, from their times per layer", 3.90, serial, "tok/s",
              "their build before a faster kernel, which gives 4.36"),
        Check("tokens/s, the same layers with reads and computing overlapped", 4.36, overlapped, "tok/s",
              "not measured: the most that prefetching could give"),
        Check("bytes/s of reads inside a layer", 17.5e9, B / card.blocks / layer_read, "B/s",
              "4 concurrent reads do not reach the sequential speed"),
    ]  # fmt: skip
