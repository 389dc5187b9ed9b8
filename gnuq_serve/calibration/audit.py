"""Is the promised risk kept in service? A test on labelled answers that may be looked at after every label.

Testing by betting (Waudby-Smith and Ramdas 2024, arXiv:2010.09686): with errors ``X_t`` in {0, 1} of answers
drawn at random from those answered, and a claim "risk at most ``a``", the product of
``(q/a)^X_t ((1-q)/(1-a))^(1-X_t)`` for a fixed ``q > a`` is a nonnegative supermartingale from 1 under the
claim: each factor is a bet ``1 + b (X_t - a)`` with ``b = (q - a) / (a (1 - a)) >= 0``. So is its mean over
``q``. By Ville's inequality it ever reaches ``1/d`` with probability at most ``d``: reject the claim then,
whenever that is. The same in the other direction (``q < a``) bounds the risk from above, and inverting both
gives an interval valid at all times.

Only a random sample counts: labels that users volunteer are not one, and must not be fed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gnuq_serve.calibration.arrays import FloatArray, IntArray

# Jeffreys' prior on (0, 1), by quantiles: alternatives q = sin^2.
_ALTERNATIVES: FloatArray = np.sin(np.pi / 2 * (np.arange(400) + 0.5) / 400) ** 2
_CHUNK = 1000  # labels at a time: 3 MB


@dataclass(slots=True)
class AuditTest:
    """Watches the claim that at most ``max_error`` of the answered questions are wrong.

    The state is the two counts and the largest evidence so far: store them to go on after a restart.

    Args:
        max_error: the promised risk.
        confidence: a kept promise is reported as broken with probability at most ``1 - confidence``, ever.
        answers: labels so far.
        errors: wrong ones among them.
        peak: largest logarithm of the evidence so far.

    Raises:
        ValueError: a level outside (0, 1), or counts that contradict each other.
    """

    max_error: float
    confidence: float = 0.95
    answers: int = 0
    errors: int = 0
    peak: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("max_error", self.max_error), ("confidence", self.confidence)):
            if not 0.0 < value < 1.0:
                raise ValueError(f"{name}={value} must lie between 0 and 1")
        if not 0 <= self.errors <= self.answers:
            raise ValueError(f"errors={self.errors} must lie between 0 and answers={self.answers}")

    def add(self, correct: bool) -> bool:
        """Count one label of a randomly drawn answered question; True where the promise counts as broken."""
        self.answers += 1
        self.errors += not correct
        self.peak = max(self.peak, self.log_evidence)
        return self.broken

    def add_all(self, labels: Sequence[bool]) -> bool:
        """As `add` for each label in turn, all at once; True where the promise counts as broken."""
        if not labels:
            return self.broken
        errors = self.errors + np.cumsum(~np.asarray(labels, dtype=np.bool_))
        answers = self.answers + np.arange(1, len(labels) + 1)
        for start in range(0, len(labels), _CHUNK):
            part = slice(start, start + _CHUNK)
            evidence = _log_evidences(self.max_error, answers[part], errors[part], above=True)
            self.peak = max(self.peak, float(evidence.max()))
        self.answers, self.errors = int(answers[-1]), int(errors[-1])
        return self.broken

    @property
    def log_evidence(self) -> float:
        """Natural logarithm of the evidence against the claim, now; 0 at the start."""
        return _log_evidence(self.max_error, self.answers, self.errors, above=True)

    @property
    def broken(self) -> bool:
        """Whether the evidence has ever reached ``1 / (1 - confidence)``."""
        return self.peak >= -math.log1p(-self.confidence)

    def risk_interval(self) -> tuple[float, float]:
        """Where the risk lies, to a thousandth outwards; valid at all times together, with ``confidence``."""
        bar = -math.log((1.0 - self.confidence) / 2.0)
        low, high = 0.0, 1.0
        for step in range(1, 1000):
            if _log_evidence(step / 1000, self.answers, self.errors, above=True) < bar:
                break
            low = step / 1000
        for step in range(999, 0, -1):
            if _log_evidence(step / 1000, self.answers, self.errors, above=False) < bar:
                break
            high = step / 1000
        return low, high


def _log_evidence(level: float, answers: int, errors: int, *, above: bool) -> float:
    return float(_log_evidences(level, np.array([answers]), np.array([errors]), above=above)[0])


def _log_evidences(level: float, answers: IntArray, errors: IntArray, *, above: bool) -> FloatArray:
    """``log mean_q (q/a)^errors ((1-q)/(1-a))^(answers-errors)`` over the alternatives on one side of ``a``.

    ``answers`` and ``errors`` are counts, one pair for each value returned.
    """
    beyond = np.greater if above else np.less
    q = _ALTERNATIVES[beyond(_ALTERNATIVES, level)]
    if q.size == 0:
        return np.zeros(len(answers))
    right, wrong = (answers - errors)[:, None], errors[:, None]
    logs = wrong * np.log(q / level) + right * np.log((1.0 - q) / (1.0 - level))
    top = logs.max(axis=1)
    evidence: FloatArray = top + np.log(np.exp(logs - top[:, None]).mean(axis=1))
    return evidence
