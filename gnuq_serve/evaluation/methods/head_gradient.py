"""Head-only gradient: ``log ||dl/dW||^2`` of the output layer alone, which a forward pass suffices for."""

from __future__ import annotations

import math

from gnuq_serve.evaluation.answered import Answered
from gnuq_serve.evaluation.methods.base import Method, each


def _read(answer: Answered) -> float | None:
    norm = answer.result("hidden", "head_grad_norm_sq")
    return math.log(norm) if norm else None


METHODS = (
    Method(
        name="head_grad_norm",
        title="squared gradient norm of l over the head's weights",
        needs=("score", "hidden"),
        pays=("hidden",),
        values=each(_read),
    ),
)
