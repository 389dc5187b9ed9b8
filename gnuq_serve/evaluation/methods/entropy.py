"""Free on a server that sees its logits: entropies of the tokens' predictive distributions."""

from __future__ import annotations

from gnuq_serve.calibration.features import FEATURES
from gnuq_serve.evaluation.answered import Answered
from gnuq_serve.evaluation.methods.base import Method, each


def _feature(name: str, answer: Answered) -> float | None:
    return FEATURES[name].read(answer.uncertainty)


METHODS = (
    Method(
        name="mean_entropy", title="mean token entropy", values=each(lambda answer: _feature("entropy", answer))
    ),
    Method(
        name="max_entropy",
        title="largest token entropy",
        values=each(lambda answer: _feature("max_entropy", answer)),
    ),
    Method(
        name="first_entropy",
        title="entropy of the first token",
        values=each(lambda answer: _feature("first_entropy", answer)),
    ),
)
