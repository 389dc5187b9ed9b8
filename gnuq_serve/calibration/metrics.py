"""How good probabilities and rankings are: AUROC with paired bootstrap intervals, ECE, Brier score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gnuq_serve.calibration.arrays import BoolArray, FloatArray, IntArray

BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value with its 95 % bootstrap interval; all None where one class is missing."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """One bar of a reliability diagram: ``low <= p < high`` (the last bin includes 1)."""

    low: float
    high: float
    count: int
    mean_p: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Probabilities against labels.

    ``ece``: expected calibration error, ten bins of equal width, weighted by their counts (Guo et al. 2017).
    ``brier``: mean squared error. ``brier_skill``: ``1 - brier / brier of the base rate``, None where all labels
    are alike. The base rate is that of these very rows, which favours the base rate slightly.
    """

    count: int
    accuracy: float
    ece: float
    brier: float
    brier_skill: float | None
    auroc: Interval
    bins: tuple[Bin, ...]


def auroc(scores: FloatArray, correct: BoolArray) -> float | None:
    """P(a right answer scores above a wrong one), ties counting half; None where one class is missing."""
    return Ranking(scores, correct).auroc(np.ones(scores.size))


class Ranking:
    """Scores sorted once, so that an AUROC with row weights takes time linear in the rows."""

    def __init__(self, scores: FloatArray, correct: BoolArray) -> None:
        self._order = np.argsort(scores, kind="stable")
        ordered = scores[self._order]
        self._right = correct[self._order].astype(np.float64)
        # Where each run of equal scores begins.
        self._starts = (
            np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if scores.size else None
        )

    def auroc(self, weights: FloatArray) -> float | None:
        """AUROC where row ``i`` counts ``weights[i]`` times; None where one class has no weight."""
        if self._starts is None:
            return None
        weight = weights[self._order]
        right = np.add.reduceat(weight * self._right, self._starts)
        wrong = np.add.reduceat(weight * (1.0 - self._right), self._starts)
        pairs = right.sum() * wrong.sum()
        if pairs <= 0.0:
            return None
        return float((right * (np.cumsum(wrong) - 0.5 * wrong)).sum() / pairs)


def bootstrap_aurocs(
    scores: Sequence[FloatArray],
    correct: BoolArray,
    groups: IntArray,
    *,
    resamples: int,
    seed: int,
) -> FloatArray:
    """AUROCs on resampled groups, shape ``(resamples, len(scores))``; the same resamples for every score.

    Args:
        scores: one array of ``n`` numbers for each score to compare.
        correct: ``n`` labels.
        groups: ``n`` group numbers from 0; whole groups are drawn with replacement.
        resamples: how many.
        seed: of the draws.

    A resample without both classes is NaN throughout.
    """
    rng = np.random.default_rng(seed)
    rankings = [Ranking(score, correct) for score in scores]
    count = int(groups.max()) + 1 if groups.size else 0
    out = np.full((resamples, len(scores)), np.nan)
    for row in out if count else []:
        weights = np.bincount(rng.integers(count, size=count), minlength=count).astype(np.float64)[groups]
        values = [ranking.auroc(weights) for ranking in rankings]
        if None not in values:
            row[:] = values
    return out


def interval(value: float | None, resampled: FloatArray) -> Interval:
    """The value with the 2.5 % and 97.5 % points of its resamples."""
    usable = resampled[np.isfinite(resampled)]
    if value is None or usable.size == 0:
        return Interval(value=value, low=None, high=None)
    low, high = np.quantile(usable, [0.025, 0.975])
    return Interval(value=value, low=float(low), high=float(high))


def reliability(probabilities: FloatArray, correct: BoolArray) -> tuple[Bin, ...]:
    """Ten bins of equal width over [0, 1]; empty ones are left out."""
    place = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    bins = []
    for index in range(BINS):
        inside = place == index
        if count := int(inside.sum()):
            bins.append(
                Bin(
                    low=index / BINS,
                    high=(index + 1) / BINS,
                    count=count,
                    mean_p=float(probabilities[inside].mean()),
                    accuracy=float(correct[inside].mean()),
                )
            )
    return tuple(bins)


def quality(
    probabilities: FloatArray,
    correct: BoolArray,
    groups: IntArray,
    *,
    resamples: int,
    seed: int,
) -> Quality:
    """ECE, Brier score, skill over the base rate and AUROC of probabilities; at least one row."""
    bins = reliability(probabilities, correct)
    count = int(correct.size)
    accuracy = float(correct.mean())
    brier = float(np.mean((probabilities - correct) ** 2))
    base = accuracy * (1.0 - accuracy)
    resampled = bootstrap_aurocs([probabilities], correct, groups, resamples=resamples, seed=seed)
    return Quality(
        count=count,
        accuracy=accuracy,
        ece=sum(part.count * abs(part.mean_p - part.accuracy) for part in bins) / count,
        brier=brier,
        brier_skill=1.0 - brier / base if base > 0.0 else None,
        auroc=interval(auroc(probabilities, correct), resampled[:, 0]),
        bins=bins,
    )
