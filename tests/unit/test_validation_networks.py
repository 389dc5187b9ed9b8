"""Small networks: their gradients and covariances against autograd, dense algebra and the product's own rule."""

import numpy as np
import pytest
import torch

pytest.importorskip("numpyro")

from curvlinops import GGNLinearOperator

from gnuq_serve.gradnorm.layer_call import LayerCall
from gnuq_serve.gradnorm.registry import rule_for
from gnuq_serve.validation.covariance import as_torch, curvature_root, gradients, variances
from gnuq_serve.validation.networks import Network
from gnuq_serve.validation.problems import PROBLEMS, draw
from gnuq_serve.validation.training import CONVERGED, train

NETWORK = Network(3, 3)
RNG = np.random.default_rng(0)
THETA = RNG.standard_normal(NETWORK.parameters)
X = RNG.standard_normal((5, 2))
CHOSEN = np.array([0, 1, 2, 1, 0])


def test_gradients_are_autograds():
    net = as_torch(NETWORK, THETA)
    g = gradients(NETWORK, THETA, X, CHOSEN)
    for row, x, chosen in zip(g, X, CHOSEN, strict=True):
        p = net(torch.from_numpy(x)[None]).softmax(-1)[0, chosen]
        flat = torch.cat([part.flatten() for part in torch.autograd.grad(p, list(net.parameters()))])
        np.testing.assert_allclose(row, flat.numpy(), rtol=1e-12, atol=1e-14)


def test_the_squared_norm_is_that_of_the_served_rules():
    """One rule for each linear layer, as on served models: ``||grad p||^2 = p^2 ||grad log p||^2``."""
    net = as_torch(NETWORK, THETA)
    inputs, outputs = [], []
    at, shown = torch.from_numpy(X)[:, None, :], []
    for layer in net:
        shown.append(at)
        at = layer(at)
        if isinstance(layer, torch.nn.Linear):
            inputs.append((layer, shown[-1].detach()))
            outputs.append(at)
    log_p = at.log_softmax(-1)[torch.arange(5), 0, torch.from_numpy(CHOSEN)]
    deltas = torch.autograd.grad(log_p.sum(), outputs)
    norm_sq = sum(
        rule_for(layer).function(layer, LayerCall.of(a), delta)
        for (layer, a), delta in zip(inputs, deltas, strict=True)
    )
    expected = np.square(gradients(NETWORK, THETA, X, CHOSEN)).sum(1)
    np.testing.assert_allclose((norm_sq * log_p.exp().square()).detach().numpy(), expected, rtol=1e-12)


def test_curvature_is_the_gauss_newton_matrix():
    net, root = as_torch(NETWORK, THETA), curvature_root(NETWORK, THETA, X)
    data = [(torch.from_numpy(X), torch.zeros(5, dtype=torch.long))]
    loss = torch.nn.CrossEntropyLoss(reduction="sum")
    operator = GGNLinearOperator(net, loss, list(net.parameters()), data, check_deterministic=False)
    dense = operator @ torch.eye(NETWORK.parameters, dtype=torch.float64)
    np.testing.assert_allclose(root.T @ root, dense.detach().numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prior", ["unit", "fan_in"])
def test_variances_by_dense_algebra(prior):
    g, sd = gradients(NETWORK, THETA, X, CHOSEN), NETWORK.per_weight(prior)
    found = variances(NETWORK, THETA, X, g, sd)
    root = curvature_root(NETWORK, THETA, X)
    precision = root.T @ root + np.diag(sd**-2.0)
    np.testing.assert_allclose(found["full"], (g @ np.linalg.inv(precision) * g).sum(1), rtol=1e-8)
    np.testing.assert_allclose(found["diagonal"], np.square(g) @ (1 / np.diag(precision)), rtol=1e-10)


def test_kfac_is_exact_for_one_input():
    """With one input the Gauss-Newton block of each weight *is* a Kronecker product."""
    g, sd = gradients(NETWORK, THETA, X, CHOSEN), NETWORK.per_weight("fan_in")
    root = curvature_root(NETWORK, THETA, X[:1])
    expected, at = np.zeros(5), 0
    for size in (part.numel() for part in as_torch(NETWORK, THETA).parameters()):
        block = slice(at, at + size)
        precision = root[:, block].T @ root[:, block] + np.diag(sd[block] ** -2.0)
        expected += (g[:, block] @ np.linalg.inv(precision) * g[:, block]).sum(1)
        at = block.stop
    np.testing.assert_allclose(variances(NETWORK, THETA, X[:1], g, sd)["kfac"], expected, rtol=1e-8)


def test_training_ends_in_a_minimum():
    data = draw(PROBLEMS["waves"], train=40, test=5, seed=1)
    network = Network(4, 2)
    found = train(network, network.per_weight("unit"), data.x, data.y, seed=0)
    assert found.gradient <= CONVERGED
    net = as_torch(network, found.theta)
    loss = torch.nn.functional.cross_entropy(
        net(torch.from_numpy(data.x)), torch.from_numpy(data.y), reduction="sum"
    )
    assert loss.item() + 0.5 * float(found.theta @ found.theta) == pytest.approx(found.loss, rel=1e-10)


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_draw_what_they_say(name):
    problem = PROBLEMS[name]
    data = draw(problem, train=4000, test=50, seed=3)
    p = problem.probabilities(data.x)
    assert p.shape == (4000, problem.classes)
    np.testing.assert_allclose(p.sum(1), 1.0)
    for chosen in range(problem.classes):  # labels follow the probabilities, also where these are extreme
        surely = p[:, chosen] > p[:, chosen].mean()
        for part in (surely, ~surely):
            share, expected = (data.y[part] == chosen).mean(), p[part, chosen].mean()
            assert abs(share - expected) < 5 * np.sqrt(0.25 / part.sum())
    assert np.linalg.norm(data.far, axis=1).min() >= 3.5
    assert (draw(problem, train=4000, test=50, seed=3).x == data.x).all()
    assert not (draw(problem, train=4000, test=50, seed=4).x == data.x).any()
