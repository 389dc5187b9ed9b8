"""Aleatoric uncertainty (arXiv:2603.29466): the Bernoulli variance ``p (1 - p)`` of the answer's probability."""

from gnuq_serve.evaluation.methods.base import Method, each

METHODS = (
    Method(
        name="aleatoric",
        title="S(1-S), S the answer's probability",
        values=each(lambda answer: answer.uncertainty.aleatoric),
    ),
    Method(
        name="aleatoric_normalized",
        title="P(1-P), P = S^(1/T)",
        values=each(lambda answer: answer.uncertainty.normalized.aleatoric),
    ),
)
