"""Eviction policies, one small class each.

A key is (block, expert). A pool (`residency.py`) reports to its policy which keys it holds (`add`, `drop`)
and uses (`hit`, in the order of use), and asks for a victim among the keys that are not pinned. `LRU`, `LFU`
and `CLOCK` are the textbook versions; if a name has several readings, the class says which it implements.
"""

from collections import deque
from collections.abc import Collection, Sequence

import numpy as np

Expert = tuple[int, int]  # (block, expert)


class Policy:
    """Base class of the policies.

    Attributes:
        keeps: whether an expert stays after its use.
        now: number of the current pass, set by the pool's owner.
        block: the block that the pass has reached.
    """

    keeps = True

    def __init__(self, slots: int):
        self.slots, self.now, self.block = slots, 0, 0

    def add(self, key: Expert) -> None:
        """A key was added, on demand (a `hit` follows) or as a prefetch that may never be used."""

    def hit(self, key: Expert) -> None:
        """A key in memory is used."""

    def used(self, keys: Sequence[Expert]) -> None:
        """`hit` for each of these."""
        for key in keys:
            self.hit(key)

    def drop(self, key: Expert) -> None:
        """A key was evicted."""

    def victim(self, pinned: Collection[Expert]) -> Expert | None:
        """The key to evict, or None if all are pinned."""
        raise NotImplementedError

    def begin(self) -> None:
        """A new pass begins."""

    def new_text(self) -> None:
        """A new text begins."""


class LRU(Policy):
    """Evicts the key whose last use is longest ago."""

    def __init__(self, slots):
        super().__init__(slots)
        self.order: dict[Expert, None] = {}  # oldest first

    def add(self, key):
        self.order[key] = None

    def hit(self, key):
        del self.order[key]
        self.order[key] = None

    def drop(self, key):
        del self.order[key]

    def victim(self, pinned):
        for key in self.order:
            if key not in pinned:
                return key
        return None


class Forget(LRU):
    """No cache: every expert is dropped after its use. Only prefetched experts stay until theirs."""

    keeps = False


class Scored(LRU):
    """Evicts the key with the lowest score; of several, the one whose last use is longest ago."""

    def score(self, key: Expert) -> float:
        raise NotImplementedError

    def victim(self, pinned):
        free = [key for key in self.order if key not in pinned]
        return min(free, key=self.score, default=None)


class LFU(Scored):
    """Evicts the key with the fewest uses so far; evicted keys keep their counts."""

    def __init__(self, slots):
        super().__init__(slots)
        self.uses: dict[Expert, int] = {}

    def hit(self, key):
        super().hit(key)
        self.uses[key] = self.uses.get(key, 0) + 1

    def score(self, key):
        return self.uses.get(key, 0)


class LFRU(LFU):
    """Scores uses divided by the passes since the last one. (The name covers several combinations of
    frequency and recency; this is the simplest.)"""

    def __init__(self, slots):
        super().__init__(slots)
        self.last: dict[Expert, int] = {}

    def add(self, key):
        super().add(key)
        self.last[key] = self.now

    def hit(self, key):
        super().hit(key)
        self.last[key] = self.now

    def score(self, key):
        return self.uses.get(key, 0) / (1 + self.now - self.last[key])


class CLOCK(Policy):
    """Evicts the first key under the hand that was not used since the hand last passed it."""

    def __init__(self, slots):
        super().__init__(slots)
        self.ring: deque[Expert] = deque()  # the hand points at the left end
        self.marked: dict[Expert, bool] = {}

    def add(self, key):
        self.ring.append(key)
        self.marked[key] = False

    def hit(self, key):
        self.marked[key] = True

    def drop(self, key):
        self.ring.remove(key)
        del self.marked[key]

    def victim(self, pinned):
        for _ in range(2 * len(self.ring)):
            key = self.ring[0]
            if key not in pinned:
                if not self.marked[key]:
                    return key
                self.marked[key] = False
            self.ring.rotate(-1)
        return None


class S3FIFO(Policy):
    """Three queues (Yang et al., SOSP 2023): new keys pass a small one, a tenth of the slots; a key that is
    used there, or comes back soon, moves to the main one; a ghost queue remembers evicted keys."""

    def __init__(self, slots):
        super().__init__(slots)
        self.small: dict[Expert, None] = {}
        self.main: dict[Expert, None] = {}
        self.ghost: dict[Expert, None] = {}
        self.uses: dict[Expert, int] = {}
        self.share = max(1, slots // 10)

    def add(self, key):
        self.uses[key] = -1  # the use that brought it in does not count
        if key in self.ghost:
            del self.ghost[key]
            self.main[key] = None
        else:
            self.small[key] = None

    def hit(self, key):
        self.uses[key] = min(3, self.uses[key] + 1)

    def drop(self, key):
        if key in self.small:
            del self.small[key]
            self.ghost[key] = None
            if len(self.ghost) > self.slots:
                del self.ghost[next(iter(self.ghost))]
        else:
            del self.main[key]
        del self.uses[key]

    def victim(self, pinned):
        if len(self.small) >= self.share or not self.main:
            for key in list(self.small):
                if key in pinned:
                    continue
                if self.uses[key] <= 0:
                    return key
                del self.small[key]  # used while new: it moves to the main queue
                self.main[key], self.uses[key] = None, 0
        for key in [key for key in self.main if key not in pinned] * 4:
            if self.uses[key] <= 0:
                return key
            self.uses[key] -= 1
            del self.main[key]
            self.main[key] = None
        return next((key for key in self.small if key not in pinned), None)


class LeastStale(LRU):
    """Least-Stale, the class-and-distance reading. (SpecMD's algorithm, arXiv 2602.03921, is not public
    in code and three readings of it circulate.) It evicts stale keys first (not touched in this pass); of
    these, keys of blocks that the pass has left behind; of these, the farthest. Touched keys come last. In a
    pool of one block all distances are equal, and this is LRU."""

    def __init__(self, slots):
        super().__init__(slots)
        self.touched: dict[Expert, int] = {}

    def add(self, key):
        super().add(key)
        self.touched[key] = self.now

    def hit(self, key):
        super().hit(key)
        self.touched[key] = self.now

    def victim(self, pinned):
        def place(key):
            distance = key[0] - self.block
            return self.touched[key] == self.now, distance >= 0, -abs(distance)

        return min((key for key in self.order if key not in pinned), key=place, default=None)


class TraceGuided(Scored):
    """Evicts the key least used in the earlier text whose routing is most like this text's so far (the idea
    of MoE-Infinity, arXiv 2401.14361; there the same table also says what to prefetch).

    Args:
        tables: (texts, blocks, E), how often each expert ran in each earlier text (`Trace.tables`).
    """

    def __init__(self, slots, tables: np.ndarray):
        super().__init__(slots)
        lengths = np.linalg.norm(tables, axis=(1, 2), keepdims=True)
        self.tables = tables / np.maximum(lengths, 1e-9)
        self.new_text()

    def new_text(self):
        self.seen = np.zeros(self.tables.shape[1:])
        self.expected = self.tables.mean(axis=0)

    def begin(self):
        if self.seen.any():
            likeness = np.tensordot(self.tables, self.seen, 2)  # (texts,)
            self.expected = self.tables[np.argmax(likeness)]

    def hit(self, key):
        super().hit(key)
        self.seen[key] += 1

    def score(self, key):
        return self.expected[key]


class Belady(Policy):
    """Evicts the key whose next use is farthest ahead (Belady 1966). It needs the future; no policy has
    fewer misses.

    Args:
        uses: key -> the numbers of the passes that use it, ascending (`Trace.uses`).
    """

    NEVER = 1 << 60

    def __init__(self, slots, uses: dict[Expert, list[int]]):
        super().__init__(slots)
        self.uses = {key: deque(at) for key, at in uses.items()}
        self.held: set[Expert] = set()

    def add(self, key):
        self.held.add(key)

    def hit(self, key):
        at = self.uses[key]
        while at and at[0] <= self.now:
            at.popleft()

    def drop(self, key):
        self.held.remove(key)

    def next_use(self, key: Expert) -> int:
        """The pass of this key's next use."""
        at = self.uses.get(key)
        return at[0] if at else self.NEVER

    def victim(self, pinned):
        free = [key for key in self.held if key not in pinned]
        return max(free, key=lambda key: (self.next_use(key), key), default=None)  # ties: the later block


SIMPLE = {
    "none": Forget,
    "lru": LRU,
    "lfu": LFU,
    "lfru": LFRU,
    "clock": CLOCK,
    "s3-fifo": S3FIFO,
    "least-stale": LeastStale,
}  # those that need no trace
