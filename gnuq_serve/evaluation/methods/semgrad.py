"""SemGrad, ExGrad, ParaGrad and HybridGrad (arXiv:2605.04638), see `gnuq_serve.gradnorm.semantic`."""

from __future__ import annotations

from gnuq_serve.evaluation.answered import Answered
from gnuq_serve.evaluation.methods.base import Method, each


def _method(name: str, title: str) -> Method:
    def read(answer: Answered) -> float | None:
        value: float | None = getattr(answer.uncertainty.signals, name)
        return value

    return Method(name=name, title=title, needs=("semantic",), pays=("semantic",), values=each(read))


METHODS = (
    _method("semgrad", "gradient at the prompt's hidden states"),
    _method("exgrad", "head's gradient of the cross-entropy"),
    _method("paragrad", "head's gradient, weighted by entropies"),
    _method("hybridgrad", "of ParaGrad and SemGrad"),
)
