"""Do live scores still look like the calibration's? Two-sample Kolmogorov-Smirnov over a sliding window."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gnuq_serve.calibration.arrays import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """One comparison of ``window`` live scores with ``reference`` calibration scores.

    ``statistic``: largest distance of the two distribution functions; ``p_value``: asymptotic, for independent
    scores. ``drifted``: it fell below the monitor's ``alpha`` here or in an earlier comparison.
    """

    statistic: float
    p_value: float
    window: int
    reference: int
    drifted: bool

    @property
    def sentence(self) -> str:
        """What to tell an operator."""
        what = "differ from" if self.drifted else "agree with"
        return (
            f"the last {self.window} scores {what} the {self.reference} of the calibration "
            f"(Kolmogorov-Smirnov {self.statistic:.3f}, p = {self.p_value:.2g})"
            + (": its promise may no longer hold, calibrate again" if self.drifted else "")
        )


class DriftMonitor:
    """Compares the last ``window`` live ``p_correct`` with the calibration's, every half window.

    A comparison is a test at ``alpha``; with the defaults, scores that never drift raise an alarm about once in
    100,000. Scores of one conversation are alike: feed one of each, or expect alarms. A shift of the scores does
    not prove that the risk has changed, nor does its absence prove the contrary: labels do
    (`gnuq_serve.calibration.audit`).

    Args:
        reference: `Calibration.reference_scores`.
        window: live scores in one comparison.
        alpha: level of one comparison.

    Raises:
        ValueError: no reference scores, a window below 20, ``alpha`` outside (0, 1).
    """

    def __init__(self, reference: Sequence[float], *, window: int = 200, alpha: float = 0.001) -> None:
        if not reference:
            raise ValueError("reference is empty: the calibration carries no scores to compare with")
        if window < 20:
            raise ValueError(f"window={window} must be at least 20 scores")
        if not 0.0 < alpha < 1.0:
            raise ValueError(f"alpha={alpha} must lie between 0 and 1, such as 0.001")
        self.window = window
        self.alpha = alpha
        self._reference = np.sort(np.asarray(reference, dtype=np.float64))
        self._live: deque[float] = deque(maxlen=window)
        self._since = 0
        self._drifted = False
        self.latest: Drift | None = None

    def add(self, p_correct: float) -> Drift | None:
        """Take one live score; the comparison where one was due, else None.

        Raises:
            ValueError: the score is not finite.
        """
        if not math.isfinite(p_correct):
            raise ValueError(f"p_correct={p_correct} must be a finite number")
        self._live.append(p_correct)
        self._since += 1
        if len(self._live) < self.window or self._since < self.window // 2:
            return None
        self._since = 0
        statistic, p_value = two_sample_ks(self._reference, np.array(self._live))
        self._drifted = self._drifted or p_value < self.alpha
        self.latest = Drift(
            statistic=statistic,
            p_value=p_value,
            window=len(self._live),
            reference=int(self._reference.size),
            drifted=self._drifted,
        )
        return self.latest


def two_sample_ks(first: FloatArray, second: FloatArray) -> tuple[float, float]:
    """Kolmogorov-Smirnov statistic and two-sided asymptotic p-value, with Stephens' small-sample correction.

    With ``n = n1 n2 / (n1 + n2)`` the p-value is ``Q((sqrt n + .12 + .11 / sqrt n) D)``,
    ``Q(x) = 2 sum_j (-1)^(j-1) exp(-2 j^2 x^2)`` (Stephens 1970). Ties make it conservative.
    """
    first, second = np.sort(first), np.sort(second)
    both = np.concatenate([first, second])
    gaps = (
        np.searchsorted(first, both, side="right") / first.size
        - np.searchsorted(second, both, side="right") / second.size
    )
    statistic = float(np.abs(gaps).max())
    root = math.sqrt(first.size * second.size / (first.size + second.size))
    return statistic, _kolmogorov_tail((root + 0.12 + 0.11 / root) * statistic)


def _kolmogorov_tail(x: float) -> float:
    if x < 0.2:  # 1 to more digits than a double has; the series converges badly there
        return 1.0
    total = math.fsum(2.0 * (-1.0) ** (j - 1) * math.exp(-2.0 * j * j * x * x) for j in range(1, 101))
    return min(1.0, max(0.0, total))
