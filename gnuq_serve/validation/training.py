"""Training to convergence: the best of the posterior's modes that L-BFGS on all data reaches from random weights.

From some starts a narrow network ends with all weights near zero and one p for every input: hence several.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from gnuq_serve.calibration.arrays import FloatArray, IntArray
from gnuq_serve.validation.networks import Network

# Largest entry of the gradient at which training counts as done; the loss is a sum over about a hundred points.
CONVERGED = 1e-4
STARTS = 5


@dataclass(frozen=True, slots=True)
class Trained:
    """Weights (P,), the loss reached, and the largest entry of its gradient there."""

    theta: FloatArray
    loss: float
    gradient: float


def train(network: Network, prior_sd: FloatArray, x: FloatArray, y: IntArray, *, seed: int) -> Trained:
    """Minimise ``-log p(y | x, theta) - log p(theta)``, the prior a Gaussian with ``prior_sd`` (P,).

    The lowest of `STARTS` minima.

    Raises:
        RuntimeError: the gradient vanished from no start.
    """
    rng = np.random.default_rng(seed)
    function = _loss_and_gradient(network)

    def objective(theta: FloatArray) -> tuple[float, FloatArray]:
        loss, gradient = function(theta, prior_sd, x, y)
        return float(loss), np.asarray(gradient)

    options = {"maxiter": 50_000, "maxfun": 100_000, "gtol": CONVERGED / 10, "ftol": 0.0, "maxcor": 30}
    ends = []
    for _ in range(STARTS):
        start = rng.standard_normal(network.parameters) * network.per_weight("fan_in")
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
        ends.append(Trained(np.asarray(found.x), float(found.fun), float(np.abs(objective(found.x)[1]).max())))
    if not (converged := [end for end in ends if end.gradient <= CONVERGED]):
        least = min(end.gradient for end in ends)
        raise RuntimeError(f"training did not converge: gradient {least:.1e} at best of {STARTS} starts")
    return min(converged, key=lambda end: end.loss)


def negative_log_posterior(network: Network, theta: Any, prior_sd: Any, x: Any, y: Any) -> Any:
    """Up to a constant; in JAX."""
    log_p = jax.nn.log_softmax(network.logits(theta, x))
    fit = jnp.take_along_axis(log_p, jnp.asarray(y)[:, None], axis=1).sum()
    return 0.5 * jnp.square(theta / prior_sd).sum() - fit


@lru_cache(maxsize=8)
def _loss_and_gradient(network: Network) -> Any:
    return jax.jit(jax.value_and_grad(lambda theta, *rest: negative_log_posterior(network, theta, *rest)))
