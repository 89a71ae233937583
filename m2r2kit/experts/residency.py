"""Which experts are in memory, in which slot, and what each access found: the bookkeeping without bytes.

The live decoder and the replay of a trace both run this code, so that their counts are the same. For
that, nothing here depends on time: a slot belongs to an expert from the moment its read is asked for.
Only whether a read that was asked for ahead came `in time` or `late` is the live run's to say.

    new_text()                a text begins: at the first, where all experts fit, reads of all of them
    begin()                   a pass begins
    speculate(m, experts)     block m may need these: reads to start; they stay until m has chosen
    demand(l, experts)        block l needs these now: reads to start at once; they stay until ..
    release(l, experts)       .. block l is through
    end()                     the pass ends

`arrive` is these in the order in which a token's pass takes them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from ..common import UserError
from .policies import Policy


class Load(NamedTuple):
    """A read to start: an expert's record into a slot; `evicted` is the key (block * E + expert) that
    the slot belonged to, or None."""

    key: int
    slot: int
    evicted: int | None


@dataclass
class Counts:
    """What came of all accesses. An access is one expert that one block needs in one pass.

    Attributes:
        resident: it was in memory from an earlier use.
        ahead: it had been asked for ahead, and not been used since; in time or late.
        missed: it was read on demand.
        speculated: reads asked for ahead.
        unused: those of them that were evicted before any use.
        filled: reads at the beginning of the first text, where all experts fit.
        refused: predictions for which there was no slot that might go.
        predicted: accesses in blocks for which something had been predicted; `right` of them rightly.
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
        """Records asked for, in all."""
        return self.missed + self.speculated + self.filled

    @property
    def recall(self) -> float | None:
        """Share of the experts needed that had been predicted, where anything was."""
        return self.right / self.predicted if self.predicted else None

    def __add__(self, other: "Counts") -> "Counts":
        more = asdict(other)
        return Counts(**{name: value + more[name] for name, value in asdict(self).items()})

    def __sub__(self, before: "Counts") -> "Counts":
        old = asdict(before)
        return Counts(**{name: value - old[name] for name, value in asdict(self).items()})


class Pool:
    """Some slots, the blocks that share them, and the policy that says who goes.

    Args:
        slots: how many.
        reserve: slots that predictions must leave to demand: none where only one block lives here.
    """

    def __init__(self, slots: int, policy: Policy, reserve: int):
        self.policy, self.reserve, self.slots = policy, reserve, slots
        self.held: dict[int, int] = {}  # key -> slot
        self.free = list(range(slots - 1, -1, -1))
        self.pinned: set[int] = set()
        self.unused: set[int] = set()  # read ahead, and not used since

    def bring(self, key: int) -> Load | None:
        """A slot for a key that is not here; None if all slots are pinned."""
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

    def remove(self, key: int) -> None:
        self.free.append(self.held.pop(key))
        self.policy.drop(key)


class Residency:
    """Args:
        blocks: numbers of the blocks that have experts.
        experts: E of each; `top_k` run for a token.
        slots: for each block, or where they are `shared` in all.
        policy: makes the policy of a pool of so many slots.
        shared: one pool for all blocks, in the place of one each.

    Attributes:
        whole: all experts fit and stay: they are read when the first text begins, expert e of the i-th
            block of a pool into slot i * E + e, and from then on nothing moves.

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
            raise UserError(
                f"{top_k} experts run for each token, and the budget holds {slots}; give it more."
            )
        self.blocks, self.experts, self.shared, self.slots = tuple(blocks), experts, shared, slots
        reserve = top_k if shared else 0
        self.pools = [Pool(slots, policy(slots), reserve) for _ in (blocks[:1] if shared else blocks)]
        self.pool_of = {l: self.pools[0 if shared else i] for i, l in enumerate(blocks)}
        self.counts = Counts()
        self.predicted: dict[int, set[int]] = {}  # block -> keys predicted for it in this pass
        self.running: tuple[int, Sequence[int]] | None = None  # what is not released yet
        self.passes = 0
        self.whole = self.pools[0].policy.keeps and slots >= experts * (len(self.blocks) if shared else 1)

    def new_text(self) -> list[Load]:
        """A new text begins, what is in memory stays: the reads that this takes."""
        for pool in self.pools:
            pool.policy.new_text()
        if not self.whole or self.counts.filled:
            return []
        loads = [
            self.pool_of[l].bring(l * self.experts + e) for l in self.blocks for e in range(self.experts)
        ]
        self.counts.filled = len(loads)
        return loads

    def begin(self) -> None:
        """A pass begins."""
        self.passes += 1
        for pool in self.pools:
            pool.policy.now = self.passes
            pool.policy.begin()

    def arrive(
        self, block: int, wanted: Sequence[int], named: Sequence[tuple[int, Sequence[int]]]
    ) -> tuple[list[Load], list[Load]]:
        """A token's pass comes to a block, the one before is through: (reads on demand, reads ahead).

        Args:
            wanted: experts that the block's router has chosen.
            named: (block, experts) that a predictor names at this moment.
        """
        if self.running:
            self.release(*self.running)
        for m, experts in named:
            if m == block:  # too late to read anything ahead; whether it was right is counted all the same
                base = m * self.experts
                self.predicted.setdefault(m, set()).update(base + expert for expert in experts)
        loads, ahead = self.demand(block, wanted), []
        for m, experts in named:
            if m != block:
                ahead += self.speculate(m, experts)
        self.running = block, wanted
        return loads, ahead

    def speculate(self, block: int, experts: Sequence[int]) -> list[Load]:
        """Experts that a block may need in this pass, best first: the reads that this takes."""
        pool, counts, loads = self.pool_of[block], self.counts, []
        base, pinned, held = block * self.experts, pool.pinned, pool.held
        keys = [base + expert for expert in experts]
        self.predicted.setdefault(block, set()).update(keys)
        missing = []
        for key in keys:  # those that are here are kept first, or one of them might go for another
            if key not in held:
                missing.append(key)
            elif key in pinned or pool.slots - len(pinned) > pool.reserve:
                pinned.add(key)
        for key in missing:
            if key in held:  # named twice
                continue
            room = pool.slots - len(pinned) > pool.reserve
            load = pool.bring(key) if room else None
            if load is None:
                counts.refused += 1
                continue
            self._gone(pool, load)
            pool.unused.add(key)
            counts.speculated += 1
            loads.append(load)
            pinned.add(key)
        return loads

    def keys(self, named: Iterable[tuple[int, Sequence[int]]]) -> list[int]:
        """The keys of named experts, given as (block, its experts)."""
        return [l * self.experts + expert for l, experts in named for expert in experts]

    def wrong(self, l: int, wanted: Sequence[int]) -> set[int]:
        """Keys of what was named for block l in this pass and is not among the experts that it wants."""
        return self.predicted.get(l, set()).difference(self.keys([(l, wanted)]))

    def demand(self, block: int, experts: Sequence[int]) -> list[Load]:
        """Experts that a block needs now, all different and no more than fit (`groups`): the reads that
        this takes. All of them stay until `release`."""
        pool, counts = self.pool_of[block], self.counts
        held, policy, pinned, unused = pool.held, pool.policy, pool.pinned, pool.unused
        base = block * self.experts
        policy.block = block
        keys = [base + expert for expert in experts]
        if self.predicted and (named := self.predicted.get(block)) is not None:
            counts.predicted += len(keys)
            counts.right += len(named.intersection(keys))
            pinned.difference_update(named)  # this was what they were kept for
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
        """A block is through with what it demanded."""
        pool, base = self.pool_of[block], block * self.experts
        keys = [base + expert for expert in experts]
        pool.pinned.difference_update(keys)
        if not pool.policy.keeps:
            for key in keys:
                pool.remove(key)

    def end(self) -> None:
        """A pass ends: what was predicted in it is forgotten."""
        if self.running:
            self.release(*self.running)
            self.running = None
        for block, named in self.predicted.items():
            self.pool_of[block].pinned -= named
        self.predicted.clear()

    def groups(self, block: int, experts: Sequence[int]) -> Iterator[list[int]]:
        """Experts of a block in groups that fit, those in memory first, so that none of them is evicted
        before its use. Demand and release each group before asking for the next."""
        pool, base = self.pool_of[block], block * self.experts
        rest = sorted(set(experts), key=lambda expert: (base + expert not in pool.held, expert))
        size = pool.slots - len(pool.pinned) if self.shared else pool.slots
        for i in range(0, len(rest), size):
            yield rest[i : i + size]

    def _gone(self, pool: Pool, load: Load) -> None:
        if load.evicted in pool.unused:
            pool.unused.remove(load.evicted)
            self.counts.unused += 1
