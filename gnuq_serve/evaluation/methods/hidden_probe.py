"""Supervised: a logistic probe on a hidden state of the answer (the idea of SAPLMA, arXiv:2304.13734)."""

from __future__ import annotations

from collections.abc import Sequence

from gnuq_serve.evaluation.answered import Answered
from gnuq_serve.evaluation.hidden_state import decode
from gnuq_serve.evaluation.methods.base import Method
from gnuq_serve.evaluation.methods.fitted import fitted


def _columns(answer: Answered) -> Sequence[float | None]:
    state = answer.result("hidden", "state")
    return [None] if state is None else decode(state).tolist()


METHODS = (
    Method(
        name="hidden_probe",
        title="logistic probe on a hidden state",
        needs=("score", "hidden"),
        pays=("hidden",),
        supervised=True,
        values=fitted(_columns, (1e-4, 1e-3, 1e-2, 1e-1)),
    ),
)
