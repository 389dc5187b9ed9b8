"""Aggregates over the answer's tokens (arXiv:2605.07776): ``p_t (1 - p_t)`` and ``||grad p_t||^2``."""

from __future__ import annotations

import math
from collections.abc import Callable

from gnuq_serve.evaluation.answered import Answered
from gnuq_serve.evaluation.methods.base import Method, each


def _over_tokens(name: str, over: Callable[[list[float]], float], answer: Answered) -> float | None:
    trace = answer.uncertainty.trace
    values = None if trace is None else [value for value in getattr(trace, name) if value is not None]
    return over(values) if values else None


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


METHODS = (
    Method(
        name="trace_aleatoric_mean",
        title="mean of p_t(1-p_t)",
        needs=("trace",),
        values=each(lambda answer: _over_tokens("aleatoric", _mean, answer)),
    ),
    Method(
        name="trace_aleatoric_max",
        title="largest p_t(1-p_t)",
        needs=("trace",),
        values=each(lambda answer: _over_tokens("aleatoric", max, answer)),
    ),
    Method(
        name="trace_epistemic_mean",
        title="mean of the tokens' squared gradient norms",
        needs=("trace",),
        pays=("trace",),
        values=each(lambda answer: _over_tokens("epistemic", _mean, answer)),
    ),
    Method(
        name="trace_epistemic_max",
        title="largest of the tokens' squared gradient norms",
        needs=("trace",),
        pays=("trace",),
        values=each(lambda answer: _over_tokens("epistemic", max, answer)),
    ),
)
