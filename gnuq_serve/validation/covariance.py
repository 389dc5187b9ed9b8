"""First-order variances ``g^T Cov g`` of predictions under several covariances of the weights.

The Laplace approximation takes ``Cov = (H + D)^-1``: H the generalised Gauss-Newton matrix (for a softmax the
Fisher information) of the data, D the prior's precision. H in full, its diagonal, or K-FAC (Martens and Grosse,
arXiv:1503.05671, by curvlinops, weights and biases apart). H needs inputs alone, no labels: that is what lets
one build it from data that is not the training data. The isotropic estimate is ``Cov = I``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from gnuq_serve.calibration.arrays import FloatArray, IntArray
from gnuq_serve.validation.networks import Network


def gradients(network: Network, theta: FloatArray, inputs: FloatArray, classes: IntArray) -> FloatArray:
    """``g``, the gradient of ``p(class | input)`` for each of M inputs, (M, P)."""
    return np.asarray(_gradients(network)(theta, inputs, classes))


def curvature_root(network: Network, theta: FloatArray, x: FloatArray) -> FloatArray:
    """B, (N C, P), with ``B^T B`` the generalised Gauss-Newton matrix of the inputs ``x`` (N, 2).

    With softmax probabilities p, ``diag(p) - p p^T = R R^T`` for ``R = diag(p^1/2) - p (p^1/2)^T``.
    """
    return np.asarray(_root(network)(theta, x)).reshape(-1, network.parameters)


def variances(
    network: Network, theta: FloatArray, x: FloatArray, g: FloatArray, prior_sd: FloatArray
) -> dict[str, FloatArray]:
    """``g^T Cov g``, (M,), by the curvature at the inputs ``x``: ``diagonal``, ``kfac`` and ``full``."""
    root, prior = curvature_root(network, theta, x), np.square(prior_sd)
    spread = np.square(g) @ prior
    # Woodbury: D^-1 - D^-1 B^T (I + B D^-1 B^T)^-1 B D^-1, and B has few rows.
    inner = np.eye(len(root)) + (root * prior) @ root.T
    reach = (g * prior) @ root.T
    return {
        "diagonal": np.square(g) @ (1.0 / (1.0 / prior + np.square(root).sum(0))),
        "kfac": _kfac(network, theta, x, g, prior_sd),
        "full": spread - (reach * np.linalg.solve(inner, reach.T).T).sum(1),
    }


def as_torch(network: Network, theta: FloatArray) -> torch.nn.Sequential:
    """The same network in torch, float64."""
    modules: list[torch.nn.Module] = []
    for out, inner in network.layers:
        modules += [torch.nn.Linear(inner, out, dtype=torch.float64), torch.nn.Tanh()]
    net = torch.nn.Sequential(*modules[:-1])
    torch.nn.utils.vector_to_parameters(torch.from_numpy(np.array(theta)), net.parameters())
    return net


def _kfac(network: Network, theta: FloatArray, x: FloatArray, g: FloatArray, prior_sd: FloatArray) -> FloatArray:
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    net = as_torch(network, theta)
    data = [(torch.from_numpy(x), torch.zeros(len(x), dtype=torch.long))]  # labels don't enter this Fisher
    total, at = np.zeros(len(g)), 0
    for parameter in net.parameters():  # one by one: the prior may differ between them
        block = slice(at, at + parameter.numel())
        at = block.stop
        factors = KFACLinearOperator(
            net,
            torch.nn.CrossEntropyLoss(reduction="sum"),
            [parameter],
            data,
            fisher_type="type-2",
            check_deterministic=False,
            num_data=len(x),
            num_per_example_loss_terms=1,
        )
        precision = float(prior_sd[block][0]) ** -2
        inverse = KFACInverseLinearOperator(factors, damping=precision, use_exact_damping=True)
        part = torch.from_numpy(np.ascontiguousarray(g[:, block].T))
        total += (part * (inverse @ part)).sum(0).detach().numpy()
    return total


@lru_cache(maxsize=4)
def _gradients(network: Network) -> Any:
    def p(theta: Any, x: Any, chosen: Any) -> Any:
        return network.probabilities(theta, x[None])[0, chosen]

    return jax.jit(jax.vmap(jax.grad(p), in_axes=(None, 0, 0)))


@lru_cache(maxsize=4)
def _root(network: Network) -> Any:
    def one(theta: Any, x: Any) -> Any:
        def logits(weights: Any) -> Any:
            return network.logits(weights, x[None])[0]

        p = jax.nn.softmax(logits(theta))
        root = jnp.diag(jnp.sqrt(p)) - jnp.outer(p, jnp.sqrt(p))
        return root.T @ jax.jacobian(logits)(theta)

    return jax.jit(jax.vmap(one, in_axes=(None, 0)))
