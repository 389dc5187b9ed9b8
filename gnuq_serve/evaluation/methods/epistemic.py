"""Epistemic uncertainty (arXiv:2603.29466): squared gradient norms over all parameters.

``S`` underflows on long answers, so its method ranks by the logarithm: the same order.
"""

from __future__ import annotations

import math

from gnuq_serve.calibration.features import FEATURES
from gnuq_serve.evaluation.answered import Answered
from gnuq_serve.evaluation.methods.base import Method, each, of_feature


def log_epistemic_normalized(answer: Answered) -> float | None:
    """``log ||grad P||^2 = 2 l/T + log ||grad (l/T)||^2``."""
    score = answer.uncertainty
    norm = FEATURES["log_mean_grad_norm_sq"].read(score)
    if norm is None or score.log_probability is None or not score.tokens:
        return None
    return 2.0 * score.log_probability / score.tokens + norm


def log_aleatoric(answer: Answered, *, normalized: bool = False) -> float | None:
    """``log p (1 - p) = log p + log(1 - p)``, at least that of ``1 - p = 1e-12``."""
    score = answer.uncertainty
    if score.log_probability is None or not score.tokens:
        return None
    log_p = score.log_probability / (score.tokens if normalized else 1)
    return log_p + math.log(max(-math.expm1(log_p), 1e-12))


METHODS = (
    Method(
        name="epistemic",
        title="squared gradient norm of S",
        pays=("gradient",),
        values=each(lambda answer: answer.uncertainty.log_epistemic),
    ),
    Method(
        name="epistemic_normalized",
        title="squared gradient norm of P",
        pays=("gradient",),
        values=each(log_epistemic_normalized),
    ),
    of_feature(
        "grad_norm",
        "squared gradient norm of l = log S",
        feature="log_grad_norm_sq",
        pays=("gradient",),
    ),
    of_feature(
        "mean_grad_norm",
        "squared gradient norm of l/T",
        feature="log_mean_grad_norm_sq",
        pays=("gradient",),
    ),
)
