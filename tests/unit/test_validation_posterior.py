"""NUTS against a posterior that a grid integrates, and convergence that is seen where there is none."""

import numpy as np
import pytest

pytest.importorskip("numpyro")

from gnuq_serve.validation.networks import Network
from gnuq_serve.validation.posterior import Sampling, sample_posterior, summarise

RNG = np.random.default_rng(0)


class LineThroughOrigin(Network):
    """Logits ``(0, theta . x)``: two weights, a posterior that can be integrated on a grid."""

    @property
    def layers(self):
        return ((1, 1), (0, 0), (0, 0))  # P = 2

    def logits(self, theta, x):
        import jax.numpy as jnp

        score = x @ theta
        return jnp.stack([jnp.zeros_like(score), score], -1)


@pytest.mark.slow
def test_moments_are_the_grids():
    network = LineThroughOrigin(1, 2)
    assert network.parameters == 2
    x, y = RNG.standard_normal((12, 2)), np.array([1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0])
    inputs = np.array([[1.0, 0.5], [-2.0, 3.0], [4.0, 4.0]])
    sd = np.array([1.0, 0.5])
    found = sample_posterior(network, sd, x, y, inputs, Sampling(draws=300), seed=0)

    axes = [np.linspace(-6 * s, 6 * s, 301) for s in sd]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    scores = grid @ x.T
    log_post = (scores * y - np.logaddexp(0, scores)).sum(1) - 0.5 * np.square(grid / sd).sum(1)
    weight = np.exp(log_post - log_post.max())
    weight /= weight.sum()
    p = 1 / (1 + np.exp(-grid @ inputs.T))
    mean = weight @ p
    variance = weight @ np.square(p - mean)
    np.testing.assert_allclose(found.mean[:, 1], mean, atol=0.03)
    np.testing.assert_allclose(found.variance[:, 1], variance, rtol=0.2)
    np.testing.assert_allclose(found.bernoulli[:, 1], weight @ (p * (1 - p)), atol=0.012)
    assert found.rhat < 1.02
    assert found.ess > 300


def test_moments_and_halves_of_given_draws():
    p = RNG.random((4, 30, 2, 3))
    found = summarise(p)
    np.testing.assert_allclose(found.mean[1, 2], p[:, :, 1, 2].mean())
    np.testing.assert_allclose(found.variance[1, 2], p[:, :, 1, 2].var(ddof=1))
    np.testing.assert_allclose(found.bernoulli[0, 1], (p[:, :, 0, 1] * (1 - p[:, :, 0, 1])).mean())
    np.testing.assert_allclose(found.halves[1, 0, 0], p[2:, :, 0, 0].var(ddof=1))


@pytest.mark.parametrize("kind", ["mean", "spread"])
def test_chains_that_disagree_are_seen(kind):
    p = 0.5 + 0.05 * RNG.standard_normal((4, 200, 3, 2))
    assert summarise(p).rhat < 1.05
    if kind == "mean":
        p[0, :, 1] += 0.2
    else:
        p[0, :, 1] = 0.5 + 4 * (p[0, :, 1] - 0.5)
    assert summarise(p).rhat > 1.1


def test_draws_that_hang_together_count_less():
    steps = RNG.standard_normal((4, 400, 1, 1))
    walk = np.zeros_like(steps)
    for at in range(1, 400):
        walk[:, at] = 0.95 * walk[:, at - 1] + steps[:, at]
    assert summarise(np.tile(walk, (1, 1, 1, 2))).ess < 200 < summarise(np.tile(steps, (1, 1, 1, 2))).ess
