"""Classification problems in the plane whose class probabilities are known, and inputs near and far.

Training inputs spread about one unit around the origin; *far* inputs stand where there is next to no training
data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gnuq_serve.calibration.arrays import FloatArray, IntArray

FAR_RADII = (3.5, 7.0)
# Inputs for covariances from other data: a cloud to one side, and a wide box.
ASIDE = (3.0, 3.0)
WIDE = 7.0


@dataclass(frozen=True, slots=True)
class Problem:
    """One data-generating process.

    Attributes:
        name: what it is called.
        classes: C.
        probabilities: ``p(class | x)``, (N, 2) to (N, C).
    """

    name: str
    classes: int
    probabilities: Callable[[FloatArray], FloatArray]


@dataclass(frozen=True, slots=True)
class Draw:
    """One data set; inputs (N, 2), classes (N,).

    Attributes:
        x, y: the training data.
        near: inputs from the training distribution.
        far: inputs at `FAR_RADII`, in any direction.
        fresh: more inputs like the training data, as many as there are training points.
        aside: as many around `ASIDE`.
        wide: as many from a box of half-width `WIDE`.
    """

    x: FloatArray
    y: IntArray
    near: FloatArray
    far: FloatArray
    fresh: FloatArray
    aside: FloatArray
    wide: FloatArray


def _binary(logit: Callable[[FloatArray], FloatArray]) -> Callable[[FloatArray], FloatArray]:
    def probabilities(x: FloatArray) -> FloatArray:
        p = 1.0 / (1.0 + np.exp(-logit(x)))
        return np.stack([1.0 - p, p], axis=1)

    return probabilities


_CENTRES = 1.2 * np.array([[0.0, 1.0], [-np.sqrt(0.75), -0.5], [np.sqrt(0.75), -0.5]])


def _three_classes(x: FloatArray) -> FloatArray:
    """Equal Gaussian clouds with standard deviation 0.8 around `_CENTRES`, by Bayes' rule."""
    logits = -np.square(x[:, None, :] - _CENTRES[None]).sum(-1) / (2 * 0.8**2)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(weights / weights.sum(1, keepdims=True), dtype=np.float64)


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("linear", 2, _binary(lambda x: 2.0 * x[:, 0] - x[:, 1])),
        Problem("waves", 2, _binary(lambda x: 4.0 * np.sin(1.5 * x[:, 0]) * np.sin(1.5 * x[:, 1]))),
        Problem("rings", 2, _binary(lambda x: 4.0 * (np.linalg.norm(x, axis=1) - 1.2))),
        Problem("three_classes", 3, _three_classes),
    )
}


def draw(problem: Problem, *, train: int, test: int, seed: int) -> Draw:
    """Draw a data set with ``train`` training points and ``test`` inputs of either kind."""
    rng = np.random.default_rng([seed, *problem.name.encode()])
    x = _inputs(problem, rng, train)
    chance = problem.probabilities(x).cumsum(1)
    y = (rng.random((train, 1)) > chance[:, :-1]).sum(1)
    angle, radius = rng.uniform(0, 2 * np.pi, test), rng.uniform(*FAR_RADII, test)
    return Draw(
        x=x,
        y=y.astype(np.int64),
        near=_inputs(problem, rng, test),
        far=np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1),
        fresh=_inputs(problem, rng, train),
        aside=np.asarray(ASIDE) + 0.5 * rng.standard_normal((train, 2)),
        wide=rng.uniform(-WIDE, WIDE, (train, 2)),
    )


def _inputs(problem: Problem, rng: np.random.Generator, count: int) -> FloatArray:
    if problem.name == "three_classes":
        return np.asarray(_CENTRES[rng.integers(3, size=count)] + 0.8 * rng.standard_normal((count, 2)))
    return rng.standard_normal((count, 2))
