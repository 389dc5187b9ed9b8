"""Supervised: logistic regressions on the same labels, each answer's value from fits on other answers.

* ``combined``: on the logarithms of aleatoric and epistemic uncertainty, as the paper's classifier
  (arXiv:2603.29466); ``combined_sum`` is their plain sum with a prior variance, and needs no labels.
* ``free_logistic``: on all free signals; ``gradient_logistic``: on these and those of the gradient pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gnuq_serve.calibration.features import FEATURES, Kind
from gnuq_serve.calibration.fit import cross_fitted
from gnuq_serve.evaluation.answered import Answered
from gnuq_serve.evaluation.methods.base import Method, Setting, Values
from gnuq_serve.evaluation.methods.epistemic import log_aleatoric, log_epistemic_normalized

Columns = Callable[[Answered], Sequence[float | None]]


def fitted(columns: Columns, strengths: Sequence[float]) -> Callable[[Sequence[Answered], Setting], Values]:
    """1 minus the cross-fitted probability of being right, from some numbers of each answer.

    A column that is missing on more than half of the answers is left out; then an answer that lacks a number.
    """

    def values(answers: Sequence[Answered], setting: Setting) -> Values:
        table = np.array([columns(answer) for answer in answers], dtype=np.float64)
        table = table[:, np.isfinite(table).mean(axis=0) > 0.5]
        whole = np.isfinite(table).all(axis=1) if table.size else np.zeros(len(answers), bool)
        correct = np.array([answer.correct for answer in answers])[whole]
        p = cross_fitted(table[whole], correct, strengths=strengths, seed=setting.seed)
        found: Values = [None] * len(answers)
        if p is not None:
            for at, value in zip(np.flatnonzero(whole), p, strict=True):
                found[at] = 1.0 - float(value)
        return found

    return values


def _joint(answer: Answered) -> list[float | None]:
    return [log_aleatoric(answer), answer.uncertainty.log_epistemic]


def _normalized(answer: Answered) -> list[float | None]:
    return [log_aleatoric(answer, normalized=True), log_epistemic_normalized(answer)]


def _sum(answers: Sequence[Answered], setting: Setting) -> Values:
    scores = [answer.uncertainty for answer in answers]
    return [_plus(score.aleatoric, score.epistemic, setting) for score in scores]


def _sum_normalized(answers: Sequence[Answered], setting: Setting) -> Values:
    scores = [answer.uncertainty.normalized for answer in answers]
    return [_plus(score.aleatoric, score.epistemic, setting) for score in scores]


def _plus(aleatoric: float | None, epistemic: float | None, setting: Setting) -> float | None:
    if aleatoric is None or epistemic is None:
        return None
    return aleatoric + setting.sigma_squared * epistemic


def _features(*kinds: Kind) -> Columns:
    read = [feature.read for feature in FEATURES.values() if feature.kind in kinds]
    return lambda answer: [one(answer.uncertainty) for one in read]


_FEW, _MANY = (1.0,), (0.01, 0.1, 1.0)

METHODS = (
    Method(
        name="combined",
        title="logistic of aleatoric and epistemic of S",
        pays=("gradient",),
        supervised=True,
        values=fitted(_joint, _FEW),
    ),
    Method(
        name="combined_normalized",
        title="logistic of aleatoric and epistemic of P",
        pays=("gradient",),
        supervised=True,
        values=fitted(_normalized, _FEW),
    ),
    Method(name="combined_sum", title="aleatoric + sigma^2 epistemic, of S", pays=("gradient",), values=_sum),
    Method(
        name="combined_sum_normalized",
        title="aleatoric + sigma^2 epistemic, of P",
        pays=("gradient",),
        values=_sum_normalized,
    ),
    Method(
        name="free_logistic",
        title="logistic of all free signals",
        supervised=True,
        values=fitted(_features("free"), _MANY),
    ),
    Method(
        name="gradient_logistic",
        title="logistic of free and gradient signals",
        pays=("gradient",),
        supervised=True,
        values=fitted(_features("free", "gradient"), _MANY),
    ),
)
