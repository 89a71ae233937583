"""The figure of merit of an early-exit method: the depth it saves at a given loss of agreement.

All curves are measured on the same texts, so intervals come from a paired bootstrap: the texts are resampled
many times, with the same samples for all methods.
"""

from dataclasses import dataclass

import numpy as np

LOSSES = (0.01, 0.05)  # losses of agreement at which savings are reported
DRAWS = 1000


@dataclass
class Curve:
    """A method's points, per text.

    Attributes:
        thresholds: (m,).
        right, nats, blocks, macs: sums over the tokens of each text, (m, n).
        tokens: number of tokens of each text, (n,).
        depth: blocks of the whole model.
    """

    thresholds: list[float]
    right: np.ndarray
    nats: np.ndarray
    blocks: np.ndarray
    macs: np.ndarray
    tokens: np.ndarray
    depth: int

    def means(self, name: str) -> np.ndarray:
        """Mean over all tokens at each point, (m,)."""
        return getattr(self, name).sum(1) / self.tokens.sum()

    def losses(self) -> np.ndarray:
        """Share of each text's tokens that differ from the whole model's, (m, n); used for calibration."""
        return 1 - self.right / self.tokens

    def saved_at(self, loss: float, draw: np.ndarray) -> float:
        """Share of the blocks saved at this loss of agreement, interpolated between points; the whole model,
        which saves nothing, is a point of every curve.

        Args:
            draw: indices of the sampled texts, with repetitions.
        """
        tokens = self.tokens[draw].sum()
        agreement = np.append(1.0, self.right[:, draw].sum(1) / tokens)
        saved = np.append(0.0, 1 - self.blocks[:, draw].sum(1) / tokens / self.depth)
        return crossing(saved, agreement, 1 - loss)


def crossing(saved: np.ndarray, agreement: np.ndarray, least: float) -> float:
    """The largest saving with an agreement of at least `least`, on the lines between points sorted by
    saving."""
    order = np.argsort(saved)
    x, y = saved[order], agreement[order]
    best = max(x[y >= least], default=0.0)
    for x0, y0, x1, y1 in zip(x, y, x[1:], y[1:], strict=False):
        if y0 >= least > y1:
            best = max(best, x0 + (x1 - x0) * (y0 - least) / (y0 - y1))
    return max(0.0, float(best))


def interval(values: np.ndarray) -> list[float]:
    """The central 95 % interval of bootstrap values."""
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]


def merits(curves: dict[str, Curve], against: str = "m2r2", draws: int = DRAWS, seed: int = 0) -> dict:
    """For each method `saved` at each loss with its interval, and `lead`, how much more `against` saves.

    Returns:
        name -> loss (as text, such as "0.05") -> {saved, from, to, lead, lead_from, lead_to}.
    """
    texts = len(next(iter(curves.values())).tokens)
    rng = np.random.default_rng(seed)
    drawn = [np.arange(texts), *(rng.integers(0, texts, texts) for _ in range(draws))]
    out: dict = {name: {} for name in curves}
    for loss in LOSSES:
        saved = {name: np.array([c.saved_at(loss, d) for d in drawn]) for name, c in curves.items()}
        for name, values in saved.items():
            lead = saved[against] - values if against in saved else np.zeros_like(values)
            (low, high), (least, most) = interval(values[1:]), interval(lead[1:])
            out[name][str(loss)] = {
                "saved": float(values[0]), "from": low, "to": high,
                "lead": float(lead[0]), "lead_from": least, "lead_to": most,
            }  # fmt: skip
    return out
