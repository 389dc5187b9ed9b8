"""SemGrad (arXiv:2605.04638) at one prompt position, computed in this process."""

from __future__ import annotations

from gnuq_serve.evaluation.answered import Answered
from gnuq_serve.evaluation.methods.base import Method, each


def _method(position: str, title: str) -> Method:
    def read(answer: Answered) -> float | None:
        found = answer.result("positions", "semgrad")
        value: float | None = None if found is None else found[position]
        return value

    return Method(
        name=f"semgrad_{position}",
        title=f"SemGrad {title}",
        needs=("score", "positions"),
        pays=("positions",),
        values=each(read),
    )


METHODS = (
    _method("mean", "over all prompt positions"),
    _method("last", "at the last prompt token"),
    _method("second_last", "at the second last"),
    _method("fourth_last", "at the fourth last"),
)
