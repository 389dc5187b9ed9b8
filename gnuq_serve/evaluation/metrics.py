"""How well an uncertainty tells wrong answers from right ones: AUROC, AUPR, PRR, AURC, risk at coverage.

Notation: of ``n`` answers, each with an uncertainty (higher: less certain), keep the ``k`` most certain; ``a(k)``
is the share of right ones among them.

* AUROC: probability that a wrong answer is less certain than a right one, ties counting half.
* AUPR: average precision with the wrong answers as positives (scikit-learn's ``average_precision_score``).
* AURC ``= 1 - A``, ``A = (1/n) sum_k a(k)``: area under the risk-coverage curve (Geifman and El-Yaniv,
  arXiv:1705.08500).
* PRR ``= (A - a(n)) / (A_best - a(n))``: prediction-rejection ratio as in LM-Polygraph (arXiv:2311.07383), all
  answers rejected in the end; ``A_best`` with every right answer before every wrong one. 1 is perfect, 0 chance.
* risk at coverage ``s``: ``1 - a(k)``, ``k = ceil(s n)``.

Answers with equal uncertainty have no order: the curves take the mean over all orders of them.
Every function takes weights ``(resamples, n)``: how often each answer was drawn. The answers are sorted once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gnuq_serve.calibration.arrays import BoolArray, FloatArray
from gnuq_serve.calibration.metrics import Interval, interval

COVERAGES = (0.2, 0.5, 0.8)
METRICS = ("auroc", "aupr", "prr", "aurc", *(f"risk_at_{share:g}" for share in COVERAGES))
_CHUNK = 250  # resamples at a time: arrays of 250 x n


@dataclass(frozen=True, slots=True)
class Ordered:
    """Answers from the most certain to the least, in groups of equal uncertainty.

    Attributes:
        order: the sorted answers.
        starts: where each group begins.
        wrong: 1.0 for a wrong answer, sorted.
    """

    order: np.ndarray
    starts: np.ndarray
    wrong: FloatArray

    @classmethod
    def of(cls, uncertainty: FloatArray, correct: BoolArray) -> Ordered:
        """Sort; at least one answer, no missing numbers."""
        order = np.argsort(uncertainty, kind="stable")
        sorted_ = uncertainty[order]
        starts = np.flatnonzero(np.concatenate([[True], sorted_[1:] != sorted_[:-1]]))
        return cls(order, starts, 1.0 - correct[order].astype(np.float64))

    def groups(self, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Right and wrong answers of each group, ``(resamples, groups)`` each."""
        sorted_ = weights[:, self.order]
        wrong = np.add.reduceat(sorted_ * self.wrong, self.starts, axis=1)
        return np.add.reduceat(sorted_, self.starts, axis=1) - wrong, wrong


def all_metrics(ordered: Ordered, weights: FloatArray) -> dict[str, FloatArray]:
    """Each of `METRICS` on each resample, ``(resamples,)``; NaN where right or wrong answers are missing."""
    right, wrong = ordered.groups(weights)
    rights, wrongs = right.sum(1), wrong.sum(1)
    both = (rights > 0) & (wrongs > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {"auroc": _auroc(right, wrong), "aupr": _average_precision(right, wrong)}
        area, best = _area(right, wrong), _best_area(rights, wrongs)
        accuracy = rights / (rights + wrongs)
        found["prr"] = (area - accuracy) / (best - accuracy)
        found["aurc"] = 1.0 - area
        for share in COVERAGES:
            found[f"risk_at_{share:g}"] = _risk_at(share, right, wrong)
    return {name: np.where(both, values, np.nan) for name, values in found.items()}


def auroc_alone(ordered: Ordered, weights: FloatArray) -> dict[str, FloatArray]:
    """As `all_metrics`, without all others."""
    right, wrong = ordered.groups(weights)
    with np.errstate(invalid="ignore"):
        return {"auroc": _auroc(right, wrong)}


def draws(count: int, resamples: int, seed: int) -> FloatArray:
    """How often each of ``count`` answers is drawn in each resample, ``(resamples, count)``."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1.0 / count), size=resamples).astype(np.float64)


def with_intervals(
    uncertainty: FloatArray,
    correct: BoolArray,
    weights: FloatArray,
    measure: Callable[[Ordered, FloatArray], dict[str, FloatArray]] = all_metrics,
) -> tuple[dict[str, Interval], FloatArray]:
    """Metrics with their 95 % percentile bootstrap intervals, and the resampled AUROCs.

    Args:
        uncertainty: ``(n,)``; NaN where a method has no value: such answers are left out.
        correct: ``(n,)``.
        weights: ``(resamples, n)``, see `draws`; the same for all methods, so that differences are paired.
        measure: gives the metrics, the AUROC among them.
    """
    there = np.isfinite(uncertainty)
    nothing = np.full(weights.shape[0], np.nan)
    if not there.any():
        return {name: Interval(value=None, low=None, high=None) for name in METRICS}, nothing
    ordered = Ordered.of(uncertainty[there], correct[there])
    value = measure(ordered, np.ones((1, int(there.sum()))))
    chunks = [measure(ordered, weights[at : at + _CHUNK][:, there]) for at in range(0, weights.shape[0], _CHUNK)]
    resampled = {name: np.concatenate([nothing[:0], *(chunk[name] for chunk in chunks)]) for name in value}
    return {name: interval(_known(value[name][0]), resampled[name]) for name in value}, resampled["auroc"]


def risk_coverage(uncertainty: FloatArray, correct: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Coverage and risk of each number of answers kept, ``(n,)`` each."""
    ordered = Ordered.of(uncertainty, correct)
    right, wrong = ordered.groups(np.ones((1, correct.size)))
    kept = np.arange(1, correct.size + 1, dtype=np.float64)
    ends = np.concatenate([[0.0], np.cumsum(right + wrong)])
    errors = np.interp(kept, ends, np.concatenate([[0.0], np.cumsum(wrong)]))
    return kept / correct.size, errors / kept


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _auroc(right: FloatArray, wrong: FloatArray) -> FloatArray:
    surer = np.cumsum(right, axis=1) - 0.5 * right
    return np.asarray((wrong * surer).sum(1) / (right.sum(1) * wrong.sum(1)))


def _average_precision(right: FloatArray, wrong: FloatArray) -> FloatArray:
    # From the least certain on: each group is a threshold.
    found, looked = np.cumsum(wrong[:, ::-1], axis=1), np.cumsum((right + wrong)[:, ::-1], axis=1)
    precision = np.divide(found, looked, out=np.zeros_like(found), where=looked > 0)
    return np.asarray((precision * wrong[:, ::-1]).sum(1) / wrong.sum(1))


def _area(right: FloatArray, wrong: FloatArray) -> FloatArray:
    """``A``, in closed form.

    A group with ``m`` answers, a share ``q`` of them right, after ``K`` answers with ``C`` right adds
    ``sum_j (C + q j) / (K + j) = q m + (C - q K) (H(K + m) - H(K))``, ``H`` the harmonic numbers.
    """
    size = right + wrong
    share = np.divide(right, size, out=np.zeros_like(right), where=size > 0)
    after, after_right = np.cumsum(size, axis=1), np.cumsum(right, axis=1)
    before, before_right = after - size, after_right - right
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, int(after.max()) + 1))])
    steps = harmonic[after.astype(int)] - harmonic[before.astype(int)]
    return np.asarray((share * size + (before_right - share * before) * steps).sum(1) / after[:, -1])


def _best_area(rights: FloatArray, wrongs: FloatArray) -> FloatArray:
    both = np.stack([rights, wrongs], axis=1)
    nothing = np.zeros_like(rights)
    return _area(np.stack([both[:, 0], nothing], axis=1), np.stack([nothing, both[:, 1]], axis=1))


def _risk_at(share: float, right: FloatArray, wrong: FloatArray) -> FloatArray:
    ends, errors = np.cumsum(right + wrong, axis=1), np.cumsum(wrong, axis=1)
    kept = np.ceil(share * ends[:, -1] - 1e-9)
    rows = np.arange(len(kept))
    at = (ends >= kept[:, None]).argmax(axis=1)  # the group in which the last kept answer falls
    size = (right + wrong)[rows, at]
    inside = kept - (ends[rows, at] - size)
    return np.asarray((errors[rows, at] - wrong[rows, at] + wrong[rows, at] * inside / size) / kept)
