"""Thresholds that keep the share of errors among answered questions under a level, with a stated confidence.

The data: ``n`` independent units (one row of each group) that played no part in fitting the score; each has a
score ``S`` in [0, 1] (higher is surer) and an error or none. ``R(t) = P(error | S > t)`` is the true risk of
answering above ``t``. For a count ``k`` let ``T_k`` be the (k+1)-th largest score (``-inf`` for ``k = n``):
rule ``k`` answers whatever scores above ``T_k``. Equal scores stay together: a rule that would cut through
them answers none of them, so it answers ``m <= k`` units.

**One rule.** Given ``T_k`` and ``m``, the ``m`` answered units are independent draws from ``S > T_k``, so their
errors are ``Binomial(m, R(T_k))``, although ``T_k`` was taken from the data. Hence
``p_k = P(Binomial(m, a) <= errors)`` is an exact p-value of ``R(T_k) > a``, and the Clopper-Pearson bound holds.

**A level named in advance**: fixed-sequence testing (Learn then Test: Angelopoulos, Bates, Candes, Jordan, Lei,
arXiv:2110.01052) of ``R(T_k) > a`` over counts ``k_1 < k_2 < ...`` fixed before the units are seen, each at
``d = 1 - confidence``, until the first that is not rejected; the last one rejected is the threshold. Let
``j`` be the first count whose rule truly has ``R > a``; the promise is broken only if ``p_j <= d``.

*Scores without ties, any risk curve.* ``R`` is continuous, so at the ends of the intervals where ``R > a`` it
equals ``a``, and between two neighbouring ends the mean risk is exactly ``a``. Which intervals the rules
before ``j`` fell into depends only on how many units lie above each of these ends. Given these numbers and
``T_j``, the errors above the interval that holds ``T_j`` are a sum of binomials with risk ``a``; those
inside it and above ``T_j`` are a binomial with a risk above ``a``, since ``R(T_j) > a`` and ``R = a`` at its
upper end. The sum is stochastically at least ``Binomial(k_j, a)``, so ``P(p_j <= d) <= d``.

*With ties, for a risk that never falls as the threshold is lowered.* Rules that answer fewer units than could
pass without an error are left untested. With ``c`` the largest threshold where ``R > a``, every unit at or below
``c`` has an error probability above ``a``; given the number of units above ``c`` (risk ``R(c) > a``)
and all scores at or below it, which also tell which rule is ``j``, the errors are again at least binomial.

**Levels and thresholds picked after looking**: a band. At up to 16 counts, fixed from ``n`` alone, the
Clopper-Pearson bound is taken at ``d`` divided by their number. By the first paragraph each fails with at most
that probability, whatever the risk curve and the ties, so with the asked confidence none of them
fails: any threshold of the band may be picked, for any level, after looking. Thresholds between those of the
band carry no promise.

**Groups.** Turns of one conversation are not independent, conversations are. One row of each group, drawn at
random, is an independent draw of "a random group, a random row in it", and that is the population that the
promise is about: each conversation counts once, however long it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gnuq_serve.calibration.arrays import BoolArray, FloatArray, IntArray
from gnuq_serve.calibration.binomial import clopper_pearson_upper, fewest_answers, lower_tail
from gnuq_serve.calibration.counts import checked_arrays, counts_to_test, first_count

_BAND_POINTS = 16
_BAND_FIRST_COUNT = 20
_CURVE_POINTS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What the data supports for one level that was named in advance.

    Answer where ``p_correct >= threshold``; None: no threshold keeps the level. ``answered`` of the held-out
    units were answered with ``errors``; ``share`` is their share; ``upper`` the Clopper-Pearson bound
    there. ``first_count`` is the number of answers at which testing began.
    """

    max_error: float
    confidence: float
    threshold: float | None
    answered: int
    errors: int
    share: float
    upper: float | None
    first_count: int
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BandPoint:
    """One threshold of the band: its risk is at most ``upper``, simultaneously over all points of the band."""

    threshold: float
    answered: int
    errors: int
    share: float
    risk: float
    upper: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """The empirical risk at one threshold: for plotting, without a promise."""

    threshold: float
    share: float
    risk: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarantee:
    """All that held-out units say about the risk of answering.

    ``units`` is the number of independent units (groups) among ``rows`` rows; ``best`` the point of the band
    with the lowest bound, None where there are no units.
    """

    confidence: float
    rows: int
    units: int
    promises: tuple[Promise, ...]
    band: tuple[BandPoint, ...]
    best: BandPoint | None
    curve: tuple[CurvePoint, ...]

    def at_most(self, max_error: float) -> BandPoint | None:
        """The loosest threshold of the band whose bound is at most ``max_error``; valid after looking."""
        return loosest(self.band, max_error)


def guarantee(
    scores: Sequence[float] | FloatArray,
    correct: Sequence[bool] | BoolArray,
    *,
    max_error: Sequence[float] = (0.1,),
    confidence: float = 0.95,
    groups: Sequence[str | None] | None = None,
    first_counts: Mapping[float, int] | None = None,
    seed: int = 0,
) -> Guarantee:
    """Thresholds for levels named in advance, and the band for whatever is picked after looking.

    Args:
        scores: one for each held-out row, in [0, 1], higher is surer; they played no part in fitting the score.
        correct: whether each answer was right.
        max_error: the levels, each a share of errors among answered questions in (0, 1).
        confidence: probability, over the draw of the held-out rows, that a promise holds; for each level on
            its own, and for all points of the band together.
        groups: rows with the same name belong together; None: a row of its own.
        first_counts: for a level, the count at which testing begins, from other data than these rows
            (`learned_first_count`); raised to `fewest_answers` where below.
        seed: which row of a group is taken.

    Raises:
        ValueError: lengths differ, a score is outside [0, 1], a level or the confidence is outside (0, 1).
    """
    score, right = checked_arrays(scores, correct)
    check_levels(max_error, confidence)
    rows = score.size
    picked = one_of_each_group(groups, rows, seed)
    score, right = score[picked], right[picked]
    order = np.argsort(-score, kind="stable")
    units = _Units(score=score[order], errors=np.concatenate([[0], np.cumsum(~right[order])]))
    band = _band(units, 1.0 - confidence)
    best = min(band, key=lambda point: (point.upper, -point.answered), default=None)
    starts = first_counts or {}
    promises = tuple(
        _promise(
            units,
            level,
            confidence,
            max(
                starts.get(level, first_count(level, confidence, units.count)), fewest_answers(level, confidence)
            ),
            best,
        )
        for level in max_error
    )
    return Guarantee(
        confidence=confidence,
        rows=rows,
        units=units.count,
        promises=promises,
        band=band,
        best=best,
        curve=_curve(units),
    )


def loosest(band: Sequence[BandPoint], max_error: float) -> BandPoint | None:
    """The point of a band that answers most among those whose bound is at most ``max_error``."""
    return max(
        (point for point in band if point.upper <= max_error), key=lambda point: point.answered, default=None
    )


def check_levels(max_error: Sequence[float], confidence: float) -> None:
    """Raise a ValueError that names the value unless all levels and the confidence lie inside (0, 1)."""
    if not max_error:
        raise ValueError("max_error is empty; give at least one level, such as 0.1")
    for level in max_error:
        if not 0.0 < level < 1.0:
            raise ValueError(f"max_error={level} must lie between 0 and 1, such as 0.1 for 10 %")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, such as 0.95")


def one_of_each_group(groups: Sequence[str | None] | None, rows: int, seed: int) -> IntArray:
    """Indices of one row of each group, drawn at random, in ascending order; rows without a group all stay."""
    if groups is None:
        return np.arange(rows)
    if len(groups) != rows:
        raise ValueError(f"groups has {len(groups)} entries for {rows} rows")
    last: dict[Any, int] = {}
    for index in np.random.default_rng(seed).permutation(rows).tolist():
        name = groups[index]
        last.setdefault(("row", index) if name is None else ("group", name), index)
    return np.sort(np.fromiter(last.values(), dtype=np.int64, count=len(last)))


@dataclass(frozen=True, slots=True)
class _Units:
    """Scores in falling order; ``errors[m]`` errors among the ``m`` highest."""

    score: FloatArray
    errors: IntArray

    @property
    def count(self) -> int:
        return int(self.score.size)

    def rules(self, counts: Sequence[int]) -> tuple[FloatArray, IntArray]:
        """``(thresholds, m)``: answering at or above a threshold is answering above ``T_count``."""
        # Below the lowest score stands -1: the rule of all units excludes nothing.
        excluded = np.append(self.score, -1.0)[np.array(counts, dtype=np.int64)]
        thresholds = np.maximum(np.nextafter(excluded, np.inf), 0.0)
        return thresholds, np.searchsorted(-self.score, -excluded, side="left").astype(np.int64)


def _promise(units: _Units, level: float, confidence: float, start: int, best: BandPoint | None) -> Promise:
    miss, fewest = 1.0 - confidence, fewest_answers(level, confidence)
    thresholds, sizes = units.rules(counts_to_test(start, units.count))
    thresholds, sizes = thresholds[sizes >= fewest], sizes[sizes >= fewest]
    failed = np.append(lower_tail(units.errors[sizes], sizes, level) > miss, True)
    before = int(np.argmax(failed))  # rules that pass before the first that does not
    threshold = float(thresholds[before - 1]) if before else None
    answered = int(sizes[before - 1]) if before else 0
    errors = int(units.errors[answered])
    share = answered / units.count if units.count else 0.0
    upper = None if threshold is None else clopper_pearson_upper(errors, answered, miss)
    return Promise(
        max_error=level,
        confidence=confidence,
        threshold=threshold,
        answered=answered,
        errors=errors,
        share=share,
        upper=upper,
        first_count=start,
        sentence=_sentence(
            level, confidence, share if threshold is not None else None, units.count, fewest, best
        ),
    )


def _sentence(
    level: float, confidence: float, share: float | None, units: int, fewest: int, best: BandPoint | None
) -> str:
    if share is not None:
        return (
            f"At most {level:.3g} errors among answered questions, with confidence {confidence:.3g}: "
            f"{share:.0%} of {units} held-out questions answered."
        )
    reached = f"No threshold keeps errors under {level:.3g} with confidence {confidence:.3g}"
    if units < fewest:
        return (
            f"{reached}: that needs {fewest} answers without an error, and there are {units} held-out questions."
        )
    if best is None or best.upper >= 1.0:
        return f"{reached}; this data supports no level at all."
    supports = f"{best.upper:.2f} at {best.share:.0%} answered"
    if best.upper <= level:
        return f"{reached} by the test fixed in advance; the band, valid after looking, supports {supports}."
    return f"{reached}; the best that this data supports is {supports}."


def _band(units: _Units, miss: float) -> tuple[BandPoint, ...]:
    counts = _band_counts(units.count)
    return tuple(
        BandPoint(
            threshold=threshold,
            answered=answered,
            errors=errors,
            share=answered / units.count,
            risk=errors / answered,
            upper=clopper_pearson_upper(errors, answered, miss / len(counts)),
        )
        for threshold, answered, errors in _different(units, counts)
    )


def _band_counts(units: int) -> list[int]:
    """Up to 16 counts in geometric progression from 20 to all units."""
    if units == 0:
        return []
    first = min(_BAND_FIRST_COUNT, units)
    return sorted({round(count) for count in np.geomspace(first, units, _BAND_POINTS)})


def _curve(units: _Units) -> tuple[CurvePoint, ...]:
    counts = np.unique(np.linspace(1, units.count, min(units.count, _CURVE_POINTS)).round().astype(int))
    return tuple(
        CurvePoint(threshold=threshold, share=answered / units.count, risk=errors / answered)
        for threshold, answered, errors in _different(units, counts.tolist())
    )


def _different(units: _Units, counts: Sequence[int]) -> list[tuple[float, int, int]]:
    """``(threshold, answered, errors)`` of the rules that answer something, each once."""
    thresholds, sizes = units.rules(counts)
    sizes, first = np.unique(sizes, return_index=True)
    found = zip(thresholds[first].tolist(), sizes.tolist(), units.errors[sizes].tolist(), strict=True)
    return [rule for rule in found if rule[1] > 0]
