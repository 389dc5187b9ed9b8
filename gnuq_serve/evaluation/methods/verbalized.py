"""Verbalised confidence (Tian et al. 2023, arXiv:2305.14975): the model names a percentage; one more answer."""

from __future__ import annotations

from gnuq_serve.evaluation.answered import Answered
from gnuq_serve.evaluation.methods.base import Method, each


def _read(answer: Answered) -> float | None:
    p = answer.result("verbalized", "p")
    return None if p is None else 1.0 - p


METHODS = (
    Method(
        name="verbalized",
        title="1 - stated confidence",
        needs=("score", "verbalized"),
        pays=("verbalized",),
        values=each(_read),
    ),
)
