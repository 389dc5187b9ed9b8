"""The batch scorer, through its public method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gnuq_serve import Sample, Scorer


class GradientPass:
    """``Scorer.score`` with options; returns ``||grad_theta l||^2``."""

    def __init__(self, scorer: Scorer, **options: Any) -> None:
        self.scorer = scorer
        self.options = options

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """``||grad_theta l||^2`` of each sample."""
        return [grad_norm_sq(result) for result in self.scorer.score(samples, **self.options)]


def grad_norm_sq(result: Any) -> float:
    """``||grad_theta l||^2`` of a result.

    Raises:
        RuntimeError: the sample was not scored.
    """
    if result.log_grad_norm_sq is None:
        raise RuntimeError(f"a sample was not scored: {result.reason}")
    return math.exp(result.log_grad_norm_sq)
