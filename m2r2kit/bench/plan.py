"""What streaming would give a model on a machine, on paper: bytes a token, I/C, a ceiling, a budget.

    B = blocks x k x bytes of an expert            what a token asks for
    C = (other weights + B) / memory bandwidth     what a token takes with all in memory, at best
    I = (1 - h) B / disk bandwidth                 h: share of B that is in memory
    C + I  on demand        max(C, I)  ahead of time, if every prediction is right and in time

All of it is a bound: real kernels and real reads do worse, and `check` says by how much one published
system does. Without a trace h is the share of all experts that the budget holds, as if routers chose
without any preference; a trace of the model gives what a cache would really have found (`simulate.py`).
"""

from dataclasses import dataclass

from ..experts.policies import LRU
from ..experts.residency import Residency
from ..experts.simulate import replay
from ..experts.trace import Trace

GROUP = 64  # weights that share a scale and a bias of 16 bit each, as mlx-lm quantises


@dataclass(frozen=True)
class Card:
    """A mixture of experts on paper.

    Attributes:
        blocks, experts, top_k: of a token's pass; `width` of the stream, `expert_width` of an expert's FFN.
        others: weights that are no routed experts; all of them run for each token.
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
        """Of one expert with so many bits a weight, scales and biases included."""
        return 3 * self.width * self.expert_width * bytes_of_weight(bits)

    def token_bytes(self, bits: int, top_k: int | None = None) -> float:
        """B."""
        return self.blocks * (top_k or self.top_k) * self.expert_bytes(bits)

    def all_bytes(self, bits: int) -> float:
        """Of all experts."""
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
    """A machine on paper: bytes/s of its disk and of its memory, bytes of memory."""

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
FREE = 0.7  # share of a machine's memory that a model may take: the system and the text need the rest


def bytes_of_weight(bits: int) -> float:
    """With scale and bias where it is quantised."""
    return bits / 8 if bits >= 16 else (bits + 32 / GROUP) / 8


@dataclass(frozen=True)
class Plan:
    """What comes out for a model on a machine.

    Attributes:
        share: of all experts that the budget holds; `hit` of B that is then in memory.
        compute, read: C and I, seconds a token.
        on_demand, ahead: tokens/s at most.
        why: what decided the budget.
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
    """The smallest budget whose reads hide behind the computing, or else all the memory there is.

    Args:
        hits: h with 1, 2, .. E slots a block (`hits_of_trace`); by default as without preference.

    Returns:
        None where even one token's experts do not fit beside the other weights.
    """
    E, B = card.experts, card.token_bytes(bits)
    hits = hits or [slots / E for slots in range(1, E + 1)]
    others = card.others * bytes_of_weight(bits)
    room = FREE * machine.memory - others
    most = min(E, int(room // (card.all_bytes(bits) / E)))
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
    """What an LRU cache of 1, 2, .. E slots a block would have found in a run: h for each."""
    found = []
    for slots in range(1, trace.experts + 1):
        if slots < trace.top_k:
            found.append(0.0)
            continue
        counts = replay(trace, Residency(trace.blocks, trace.experts, trace.top_k, slots, LRU))
        found.append(counts.resident / max(1, counts.accesses))
    return found


# --- against what was published -------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A published figure beside what this file computes."""

    what: str
    published: float
    computed: float
    unit: str
    note: str = ""


def check() -> list[Check]:
    """Flash-MoE's figures (danveloper/flash-moe, CLAUDE.md and results, commit 3601d41; their claims):
    Qwen3.5-397B-A17B with 4 of the 10 experts, on a MacBook Pro with an M3 Max."""
    card, machine = CARDS[2], MACHINES[0]
    B, small = card.token_bytes(4, 4), card.token_bytes(2, 4)
    layer_read, layer = 2.41e-3, 4.28e-3  # seconds of a layer: its reads, all of it
    serial = 1 / (card.blocks * layer)
    overlapped = 1 / (card.blocks * max(layer_read, layer - layer_read))
    return [
        Check("bytes of an expert, 4 bit", 7_077_888, card.expert_bytes(4), "B"),
        Check("bytes a token, 4 bit", 1.70e9, B, "B"),
        Check("bytes a token, 2 bit", 943e6, small, "B"),
        Check("tokens/s, reads alone at the disk's 17.5 GB/s", 4.36, machine.disk / B, "tok/s",
              "a ceiling: they reach less than half of it"),
        Check("tokens/s, one thing after the other, from their times of a layer", 3.90, serial, "tok/s",
              "their build before a faster kernel, which gave 4.36"),
        Check("tokens/s, the same layers with reads and computing overlapped", 4.36, overlapped, "tok/s",
              "nobody measured this: what looking ahead could give at most"),
        Check("bytes/s of reads inside a layer", 17.5e9, B / card.blocks / layer_read, "B/s",
              "4 reads at once do not reach the sequential speed"),
    ]  # fmt: skip
