"""The cost model of speculative decoding: tokens gained over work done (notebooks 04 and 14).

    S   = tau / (g c + v + o)                        all costs in steps of plain decoding
    tau = 1 + a_1 + a_1 a_2 + .. + a_1 a_2 .. a_g    tokens that one verification yields

g  tokens drafted before a verification        c  cost of drafting one token
a  share of the drafts accepted at a position  v  cost of verifying g + 1 positions
   if all earlier ones are accepted            o  other costs of a step

After Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"
(arXiv 2211.17192): section 3.1 for tau, theorem 3.8 for S with v = 1 and o = 0.
"""

from collections.abc import Callable, Sequence


def tau(a: float | Sequence[float], g: int) -> float:
    """Tokens that one verification yields on average: 1 with no drafts, at most g + 1.

    Args:
        a: acceptance, one for all positions (tau is then (1 - a^(g+1)) / (1 - a)), or one per position;
            the last one applies to all further positions.
        g: tokens drafted, at least 0.

    Raises:
        ValueError: g is negative, or an acceptance is not between 0 and 1.
    """
    if g < 0:
        raise ValueError(f"the number of drafts must be at least 0; got {g}")
    positions = list(a) if isinstance(a, Sequence) else [a]
    if not positions or not all(0 <= each <= 1 for each in positions):
        raise ValueError(f"an acceptance must lie between 0 and 1; got {a}")
    total = reached = 1.0  # `reached`: probability that all drafts so far are accepted
    for i in range(g):
        reached *= positions[min(i, len(positions) - 1)]
        total += reached
    return total


def even_acceptance(tokens: float, g: float) -> float:
    """The acceptance, equal at all positions, that yields `tokens` per verification: the inverse of `tau`.

    Args:
        tokens: tau, from 1 to g + 1.
        g: tokens drafted, more than 0; the mean if a drafter stops early.

    Raises:
        ValueError: g is not positive, or no acceptance yields this tau.
    """
    if g <= 0 or not 1 <= tokens <= g + 1:
        raise ValueError(f"{g} drafts yield 1 to {g + 1} tokens, and g must be positive; got {tokens}")
    low, high = 0.0, 1.0
    for _ in range(50):  # (1 - a^(g+1)) / (1 - a) rises with a
        a = (low + high) / 2
        low, high = (a, high) if (1 - a ** (g + 1)) / (1 - a) < tokens else (low, a)
    return (low + high) / 2


def speedup(
    a: float | Sequence[float], g: int, c: float, v: float | Callable[[int], float] = 1.0, o: float = 0.0
) -> float:
    """S, the predicted speed-up over plain decoding; 1 with g = 0, v = 1 and o = 0.

    Args:
        a, g: as for `tau`.
        c: cost of one draft, in plain steps; about exit depth / number of blocks.
        v: cost of one verification of g + 1 positions, in plain steps, or a function of the positions.
        o: overhead of a step, in plain steps.
    """
    return tau(a, g) / (g * c + (v(g + 1) if callable(v) else v) + o)


def best_drafts(
    a: float | Sequence[float],
    c: float,
    v: float | Callable[[int], float] = 1.0,
    o: float = 0.0,
    longest: int = 16,
) -> tuple[int, float]:
    """The draft length 0..longest with the highest predicted speed-up, and that speed-up.

    Ties go to the shortest. Length 0 means that drafting does not pay: nothing is drafted or verified, so the
    speed-up is 1.
    """
    choices = [(1.0, 0), *((speedup(a, g, c, v, o), g) for g in range(1, longest + 1))]
    value, g = max(choices, key=lambda choice: (choice[0], -choice[1]))
    return g, value
