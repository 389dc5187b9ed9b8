"""P(True) (Kadavath et al. 2022, arXiv:2207.05221): the model says whether its answer is true; one more pass."""

from __future__ import annotations

from gnuq_serve.evaluation.answered import Answered
from gnuq_serve.evaluation.methods.base import Method, each


def _read(answer: Answered) -> float | None:
    p = answer.result("p_true", "p")
    return None if p is None else 1.0 - p


METHODS = (
    Method(
        name="p_true",
        title="1 - P(True)",
        needs=("score", "p_true"),
        pays=("p_true",),
        values=each(_read),
    ),
)
