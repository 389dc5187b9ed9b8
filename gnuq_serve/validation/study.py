"""One run: a data set, a network trained on it, the reference by NUTS, and every estimate at every input."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gnuq_serve.validation.covariance import gradients, variances
from gnuq_serve.validation.networks import Network
from gnuq_serve.validation.posterior import Sampling, sample_posterior
from gnuq_serve.validation.problems import PROBLEMS, draw
from gnuq_serve.validation.training import train

# Where a covariance's curvature comes from: fields of `Draw`, the training data first.
SOURCES = {"train": "x", "fresh": "fresh", "aside": "aside", "wide": "wide"}


@dataclass(frozen=True, slots=True)
class Case:
    """One run's name: problem, width of the hidden layers, seed."""

    problem: str
    width: int
    seed: int


@dataclass(frozen=True, slots=True)
class Settings:
    """What every run shares; another value, other runs."""

    train: int = 100
    test: int = 100
    draws: int = 300
    prior: str = "unit"


def run_case(case: Case, settings: Settings) -> dict[str, Any]:
    """Run one case; plain JSON.

    ``inputs`` holds one list for each quantity, near inputs first, then as many far ones: ``p`` of the class that
    the trained network finds likeliest, that class's posterior ``variance``, the same by either half of the
    chains (``half_0``, ``half_1``), ``bernoulli`` (the posterior mean of ``p (1 - p)``), and the first-order
    variances ``isotropic``, ``diagonal:train``, ``kfac:aside``, … Where training failed, ``failed`` says
    so.
    """
    problem = PROBLEMS[case.problem]
    network = Network(case.width, problem.classes)
    data = draw(problem, train=settings.train, test=settings.test, seed=case.seed)
    prior_sd = network.per_weight(settings.prior)
    row: dict[str, Any] = asdict(case) | {"parameters": network.parameters}
    started = time.monotonic()
    try:
        trained = train(network, prior_sd, data.x, data.y, seed=case.seed)
    except RuntimeError as error:
        return row | {"failed": str(error)}
    inputs = np.concatenate([data.near, data.far])
    p = np.asarray(network.probabilities(trained.theta, inputs))
    chosen = p.argmax(1)
    each = np.arange(len(inputs))
    g = gradients(network, trained.theta, inputs, chosen)
    columns = {"p": p[each, chosen], "isotropic": np.square(g).sum(1)}
    for source, field in SOURCES.items():
        by_kind = variances(network, trained.theta, getattr(data, field), g, prior_sd)
        columns |= {f"{kind}:{source}": values for kind, values in by_kind.items()}
    sampled = time.monotonic()
    reference = sample_posterior(
        network, prior_sd, data.x, data.y, inputs, Sampling(draws=settings.draws), seed=case.seed
    )
    columns |= {
        "variance": reference.variance[each, chosen],
        "bernoulli": reference.bernoulli[each, chosen],
        "half_0": reference.halves[0, each, chosen],
        "half_1": reference.halves[1, each, chosen],
    }
    return row | {
        "rhat": reference.rhat,
        "ess": reference.ess,
        "divergent": reference.divergent,
        "steps": reference.steps,
        "gradient": trained.gradient,
        "seconds_estimates": round(sampled - started, 2),
        "seconds_nuts": round(time.monotonic() - sampled, 2),
        "inputs": {name: [float(f"{value:.7g}") for value in values] for name, values in columns.items()},
    }
