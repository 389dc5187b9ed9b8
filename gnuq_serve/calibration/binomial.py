"""Exact binomial facts: the Clopper-Pearson bound, and what a one-sided test lets pass."""

from __future__ import annotations

import math

import numpy as np

from gnuq_serve.calibration.arrays import FloatArray, IntArray


def clopper_pearson_upper(errors: int, count: int, miss: float) -> float:
    """One-sided upper bound for a binomial probability, wrong with probability at most ``miss``."""
    from scipy.special import betaincinv

    return 1.0 if errors >= count else float(betaincinv(errors + 1, count - errors, 1.0 - miss))


def lower_tail(errors: IntArray, counts: IntArray, level: float) -> FloatArray:
    """``P(Binomial(counts, level) <= errors)``, elementwise: the p-value of "the risk is above ``level``"."""
    from scipy.special import bdtr

    return np.asarray(bdtr(errors.astype(np.float64), counts, level), dtype=np.float64)


def fewest_answers(max_error: float, confidence: float) -> int:
    """How many answers without an error are the least that supports a level: 29 for 10 % at 95 %."""
    count = max(1, math.ceil(math.log1p(-confidence) / math.log1p(-max_error)))
    # The logarithms round; the test itself is (1 - a)^k <= 1 - confidence.
    while (1.0 - max_error) ** count > 1.0 - confidence:
        count += 1
    while count > 1 and (1.0 - max_error) ** (count - 1) <= 1.0 - confidence:
        count -= 1
    return count


def most_errors(counts: IntArray, level: float, miss: float) -> IntArray:
    """The most errors among ``counts`` answers that still pass at ``level``; -1 where none do."""
    from scipy.stats import binom

    # The quantile is the first number whose tail reaches ``miss``; it passes only if it does so exactly.
    quantile = binom.ppf(miss, counts, level).astype(np.int64)
    return np.where(lower_tail(quantile, counts, level) <= miss, quantile, quantile - 1)
