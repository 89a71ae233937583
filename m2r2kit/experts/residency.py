"""Which experts are in memory, in which slots, and the outcome of each access: bookkeeping without bytes.

An expert is (block, expert) everywhere. The live decoder and the replay of a trace both run this code, so
their counts are equal. Nothing here depends on time: a slot belongs to an expert from the moment its read is
issued. Only the live run knows whether a prefetch is `in time` or `late`.

    new_text()                a text begins; if all experts fit, the first text reads all of them
    begin()                   a pass begins
    speculate(m, experts)     block m may need these: reads to start; they stay until m has chosen
    demand(l, experts)        block l needs these now: reads to start at once; they stay until `release`
    release(l, experts)       block l is done
    end()                     the pass ends

`arrive` calls these in the order of a token's pass.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from ..common import UserError
from .policies import Expert, Policy


class Load(NamedTuple):
    """A read to start: the record of `key` into a slot of its block's pool. `evicted` is the expert that the
    slot belonged to, or None."""

    key: Expert
    slot: int
    evicted: Expert | None


@dataclass
class Counts:
    """Outcomes of all accesses. An access is one expert that one block needs in one pass.

    Attributes:
        resident: in memory from an earlier use.
        ahead: prefetched and used for the first time; in time or late.
        missed: read on demand.
        speculated: prefetches issued.
        unused: prefetches evicted before any use.
        filled: reads at the start of the first text, if all experts fit.
        refused: predictions for which no slot could be freed.
        predicted: accesses in blocks that had a prediction; `right` of them were predicted.
    """

    resident: int = 0
    ahead: int = 0
    missed: int = 0
    speculated: int = 0
    unused: int = 0
    filled: int = 0
    refused: int = 0
    predicted: int = 0
    right: int = 0

    @property
    def accesses(self) -> int:
        return self.resident + self.ahead + self.missed

    @property
    def reads(self) -> int:
        """All reads issued."""
        return self.missed + self.speculated + self.filled

    @property
    def recall(self) -> float | None:
        """Share of the needed experts that were predicted; None without any prediction."""
        return self.right / self.predicted if self.predicted else None

    def __add__(self, other: "Counts") -> "Counts":
        more = asdict(other)
        return Counts(**{name: value + more[name] for name, value in asdict(self).items()})

    def __sub__(self, before: "Counts") -> "Counts":
        old = asdict(before)
        return Counts(**{name: value - old[name] for name, value in asdict(self).items()})


class Pool:
    """Slots shared by one or all blocks, and their eviction policy.

    Args:
        slots: number of slots.
        reserve: slots that predictions must leave free for demand; 0 if the pool serves one block.
    """

    def __init__(self, slots: int, policy: Policy, reserve: int):
        self.policy, self.reserve, self.slots = policy, reserve, slots
        self.held: dict[Expert, int] = {}  # -> slot
        self.free = list(range(slots - 1, -1, -1))
        self.pinned: set[Expert] = set()
        self.unused: set[Expert] = set()  # prefetched, and not used since

    def bring(self, key: Expert) -> Load | None:
        """Assign a slot to an expert that is not in memory; None if all slots are pinned."""
        evicted = None
        if not self.free:
            evicted = self.policy.victim(self.pinned)
            if evicted is None:
                return None
            self.remove(evicted)
        slot = self.free.pop()
        self.held[key] = slot
        self.policy.add(key)
        return Load(key, slot, evicted)

    def remove(self, key: Expert) -> None:
        """Free an expert's slot."""
        self.free.append(self.held.pop(key))
        self.policy.drop(key)


class Residency:
    """The slots of all blocks and their contents.

    Args:
        blocks: indices of the blocks that have experts.
        experts: E, the experts of each block; `top_k` of them run for a token.
        slots: of each block, or of all blocks together if `shared`.
        policy: slots -> the policy of a pool of that size.
        shared: one pool for all blocks instead of one each.

    Attributes:
        whole: all experts fit and stay. They are read at the start of the first text, expert e of the i-th
            block of a pool into slot i * E + e, and never move.

    Raises:
        UserError: too few slots for one token.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        experts: int,
        top_k: int,
        slots: int,
        policy: Callable[[int], Policy],
        shared: bool = False,
    ):
        if slots < top_k:
            raise UserError(f"{top_k} experts run for each token, but the budget holds {slots}; increase it.")
        self.blocks, self.experts, self.shared, self.slots = tuple(blocks), experts, shared, slots
        reserve = top_k if shared else 0
        self.pools = [Pool(slots, policy(slots), reserve) for _ in (blocks[:1] if shared else blocks)]
        self.pool_of = {l: self.pools[0 if shared else i] for i, l in enumerate(blocks)}
        self.counts = Counts()
        self.predicted: dict[int, set[Expert]] = {}  # block -> predicted for it in this pass
        self.running: tuple[int, Sequence[int]] | None = None  # block and experts not released yet
        self.passes = 0
        self.whole = self.pools[0].policy.keeps and slots >= experts * (len(self.blocks) if shared else 1)

    def new_text(self) -> list[Load]:
        """A new text begins; memory keeps its experts. Returns the reads to start."""
        for pool in self.pools:
            pool.policy.new_text()
        if not self.whole or self.counts.filled:
            return []
        loads = [self.pool_of[l].bring((l, e)) for l in self.blocks for e in range(self.experts)]
        self.counts.filled = len(loads)
        return loads

    def begin(self) -> None:
        """A pass begins."""
        self.passes += 1
        for pool in self.pools:
            pool.policy.now = self.passes
            pool.policy.begin()

    def arrive(
        self, block: int, wanted: Sequence[int], predicted: Sequence[tuple[int, Sequence[int]]]
    ) -> tuple[list[Load], list[Load]]:
        """A token's pass reaches a block, and the block before is done: (demand reads, prefetches).

        Args:
            wanted: experts that the block's router chose.
            predicted: (block, experts) predicted at this block.
        """
        if self.running:
            self.release(*self.running)
        for m, experts in predicted:
            if m == block:  # too late for a prefetch, but it counts as a prediction
                self.predicted.setdefault(m, set()).update((m, expert) for expert in experts)
        loads, ahead = self.demand(block, wanted), []
        for m, experts in predicted:
            if m != block:
                ahead += self.speculate(m, experts)
        self.running = block, wanted
        return loads, ahead

    def speculate(self, block: int, experts: Sequence[int]) -> list[Load]:
        """Prefetch experts that a block may need in this pass, best first. Returns the reads to start."""
        pool, counts, loads = self.pool_of[block], self.counts, []
        pinned, held = pool.pinned, pool.held
        keys = [(block, expert) for expert in experts]
        self.predicted.setdefault(block, set()).update(keys)
        missing = []
        for key in keys:  # pin those in memory first, so that none of them is evicted for another
            if key not in held:
                missing.append(key)
            elif key in pinned or pool.slots - len(pinned) > pool.reserve:
                pinned.add(key)
        for key in missing:
            if key in held:  # predicted twice
                continue
            free = pool.slots - len(pinned) > pool.reserve
            load = pool.bring(key) if free else None
            if load is None:
                counts.refused += 1
                continue
            self._gone(pool, load)
            pool.unused.add(key)
            counts.speculated += 1
            loads.append(load)
            pinned.add(key)
        return loads

    def wrong(self, l: int, wanted: Sequence[int]) -> set[Expert]:
        """The wrong predictions for block l in this pass."""
        return self.predicted.get(l, set()).difference((l, expert) for expert in wanted)

    def demand(self, block: int, experts: Sequence[int]) -> list[Load]:
        """Request experts that a block needs now, distinct and no more than fit (`groups`). They stay until
        `release`. Returns the reads to start."""
        pool, counts = self.pool_of[block], self.counts
        held, policy, pinned, unused = pool.held, pool.policy, pool.pinned, pool.unused
        policy.block = block
        keys = [(block, expert) for expert in experts]
        if self.predicted and (predicted := self.predicted.get(block)) is not None:
            counts.predicted += len(keys)
            counts.right += len(predicted.intersection(keys))
            pinned.difference_update(predicted)  # they were pinned until now
        pinned.update(keys)
        missing = [key for key in keys if key not in held]
        present = [key for key in keys if key in held] if missing else keys
        policy.used(present)
        ahead = unused.intersection(present) if unused else ()
        counts.ahead += len(ahead)
        counts.resident += len(present) - len(ahead)
        if ahead:
            unused -= ahead
        if not missing:
            return missing
        counts.missed += len(missing)
        loads = []
        for key in missing:
            load = pool.bring(key)
            if unused:
                self._gone(pool, load)
            loads.append(load)
        policy.used(missing)
        return loads

    def release(self, block: int, experts: Sequence[int]) -> None:
        """Release the experts that a block demanded."""
        pool, keys = self.pool_of[block], [(block, expert) for expert in experts]
        pool.pinned.difference_update(keys)
        if not pool.policy.keeps:
            for key in keys:
                pool.remove(key)

    def end(self) -> None:
        """End the pass and drop its predictions."""
        if self.running:
            self.release(*self.running)
            self.running = None
        for block, predicted in self.predicted.items():
            self.pool_of[block].pinned -= predicted
        self.predicted.clear()

    def groups(self, block: int, experts: Sequence[int]) -> Iterator[list[int]]:
        """Split experts of a block into groups that fit, those in memory first, so that none is evicted
        before its use. Demand and release each group before taking the next."""
        pool = self.pool_of[block]
        rest = sorted(set(experts), key=lambda expert: ((block, expert) not in pool.held, expert))
        size = pool.slots - len(pool.pinned) if self.shared else pool.slots
        for i in range(0, len(rest), size):
            yield rest[i : i + size]

    def _gone(self, pool: Pool, load: Load) -> None:
        if load.evicted in pool.unused:
            pool.unused.remove(load.evicted)
            self.counts.unused += 1
