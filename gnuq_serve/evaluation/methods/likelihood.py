"""Free: the answer's log-probability, which every server can give."""

from __future__ import annotations

from gnuq_serve.calibration.features import FEATURES
from gnuq_serve.evaluation.answered import Answered
from gnuq_serve.evaluation.methods.base import Method, each


def _minus(name: str, answer: Answered) -> float | None:
    value = FEATURES[name].read(answer.uncertainty)
    return None if value is None else -value


METHODS = (
    Method(name="nll", title="-l", values=each(lambda answer: _minus("log_probability", answer))),
    Method(name="mean_nll", title="-l/T", values=each(lambda answer: _minus("mean_log_probability", answer))),
    Method(
        name="max_token_nll",
        title="-log of the lowest token probability",
        values=each(lambda answer: _minus("min_token_log_probability", answer)),
    ),
)
