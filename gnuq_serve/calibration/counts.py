"""At which numbers of answers a level is tested: where testing begins, and the steps from there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gnuq_serve.calibration.arrays import BoolArray, FloatArray
from gnuq_serve.calibration.binomial import fewest_answers, most_errors

_STEP = 1.05  # from one tested count to the next
_STATED_WORTH = 100.0


def counts_to_test(start: int, units: int) -> list[int]:
    """The tested counts: from ``start``, each 5 % above the one before, to all units; empty beyond them."""
    counts = []
    count = start
    while count < units:
        counts.append(count)
        count = max(count + 1, math.floor(count * _STEP))
    return [*counts, units] if start <= units else []


def first_count(max_error: float, confidence: float, units: int) -> int:
    """Where testing begins unless learned: a tenth of the units, at least `fewest_answers`.

    A later start forgives a confident error among the very first answers; an earlier one allows a promise
    where few can be answered.
    """
    return max(fewest_answers(max_error, confidence), math.ceil(units / 10))


def learned_first_count(
    scores: Sequence[float] | FloatArray,
    correct: Sequence[bool] | BoolArray,
    *,
    units: int,
    max_error: float,
    confidence: float,
) -> int:
    """The count at which a first test among ``units`` new units most likely succeeds.

    From probabilities and labels of *other* rows (cross-validated ones of those used for fitting): for each
    count the beta-binomial probability of passing. The error rate among the highest scores counts together
    with what these scores say themselves, worth 100 answers: labels alone are too few at the top.
    """
    from scipy.stats import betabinom

    score, right = checked_arrays(scores, correct)
    order = np.argsort(-score, kind="stable")
    fewest = fewest_answers(max_error, confidence)
    if units < fewest or score.size == 0:
        return fewest
    counts = np.array(counts_to_test(fewest, units))
    seen = np.maximum(1, np.round(counts / units * score.size).astype(int))
    wrong = np.cumsum(~right[order])[seen - 1]
    stated = np.cumsum(1.0 - score[order])[seen - 1] / seen
    allowed = most_errors(counts, max_error, 1.0 - confidence)
    chance = betabinom.cdf(
        allowed,
        counts,
        wrong + _STATED_WORTH * stated + 0.01,
        seen - wrong + _STATED_WORTH * (1.0 - stated) + 0.01,
    )
    return int(counts[int(np.argmax(chance))])


def checked_arrays(
    scores: Sequence[float] | FloatArray, correct: Sequence[bool] | BoolArray
) -> tuple[FloatArray, BoolArray]:
    """Scores and labels as arrays of one length; a ValueError unless all scores lie in [0, 1]."""
    score = np.asarray(scores, dtype=np.float64).reshape(-1)
    right = np.asarray(correct, dtype=np.bool_).reshape(-1)
    if score.size != right.size:
        raise ValueError(f"scores has {score.size} entries and correct {right.size}; one of each for every row")
    if not bool(((score >= 0.0) & (score <= 1.0)).all()):  # also false for NaN
        raise ValueError("scores must be probabilities in [0, 1]; leave out the rows that were not scored")
    return score, right
