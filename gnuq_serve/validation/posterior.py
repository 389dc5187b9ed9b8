"""The reference: NUTS over all weights, and what its draws say of predictions, with their convergence.

Weights are never judged: hidden units can be swapped and flipped without any effect, so chains sit in different,
equal corners for ever. Predictions don't see that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS

from gnuq_serve.calibration.arrays import FloatArray, IntArray
from gnuq_serve.validation.networks import Network


@dataclass(frozen=True, slots=True)
class Sampling:
    """How NUTS runs: chains from draws of the prior, warm-up as long as what is kept."""

    chains: int = 4
    draws: int = 300
    max_tree_depth: int = 7


@dataclass(frozen=True, slots=True)
class Reference:
    """What the posterior says of M inputs and C classes.

    Attributes:
        mean: posterior mean of p, (M, C).
        variance: posterior variance of p, (M, C).
        bernoulli: posterior mean of ``p (1 - p)``, (M, C).
        halves: the variance by either half of the chains, (2, M, C): how well the reference knows itself.
        rhat: largest split R-hat of any p, and of its distance to the median (spread; Vehtari et al. 2021).
        ess: smallest effective sample size of any p.
        divergent: share of divergent draws.
        steps: mean leapfrog steps of a draw.
    """

    mean: FloatArray
    variance: FloatArray
    bernoulli: FloatArray
    halves: FloatArray
    rhat: float
    ess: float
    divergent: float
    steps: float


def sample_posterior(
    network: Network,
    prior_sd: FloatArray,
    x: FloatArray,
    y: IntArray,
    inputs: FloatArray,
    sampling: Sampling,
    *,
    seed: int,
) -> Reference:
    """Sample the posterior given training data (N, 2), (N,), and evaluate it at ``inputs`` (M, 2)."""
    mcmc = _mcmc(network, sampling)
    key, start = jax.random.split(jax.random.PRNGKey(seed))
    # Far apart, so that R-hat means something.
    init = jax.random.normal(start, (sampling.chains, network.parameters)) * prior_sd
    mcmc.run(
        key,
        jnp.asarray(prior_sd),
        jnp.asarray(x),
        jnp.asarray(y),
        init_params={"theta": init},
        extra_fields=("num_steps", "diverging"),
    )
    theta = mcmc.get_samples(group_by_chain=True)["theta"]
    fields = mcmc.get_extra_fields()
    return summarise(
        np.asarray(_predict(network)(theta, jnp.asarray(inputs))),
        divergent=float(np.mean(fields["diverging"])),
        steps=float(np.mean(fields["num_steps"])),
    )


def summarise(p: FloatArray, *, divergent: float = 0.0, steps: float = 0.0) -> Reference:
    """Moments and convergence of predictions ``p`` (chains, draws, M, C)."""
    chains, draws, inputs, classes = p.shape
    # Of two classes the second mirrors the first.
    series = (p[..., :1] if classes == 2 else p).reshape(chains, draws, -1)
    series = series[..., series.std(axis=(0, 1)) > 1e-9]  # a constant has no R-hat
    spread = np.abs(series - np.median(series, axis=(0, 1)))
    rhats = np.concatenate([split_gelman_rubin(series), split_gelman_rubin(spread)])
    halves = np.stack([part.reshape(-1, inputs, classes).var(0, ddof=1) for part in np.array_split(p, 2)])
    flat = p.reshape(-1, inputs, classes)
    return Reference(
        mean=flat.mean(0),
        variance=flat.var(0, ddof=1),
        bernoulli=(flat * (1.0 - flat)).mean(0),
        halves=halves,
        rhat=float(np.max(rhats, initial=1.0)),
        ess=float(np.min(effective_sample_size(series), initial=float(chains * draws))),
        divergent=divergent,
        steps=steps,
    )


@lru_cache(maxsize=4)
def _mcmc(network: Network, sampling: Sampling) -> MCMC:
    """One sampler for all data sets of one shape, so that it is compiled once."""

    def model(prior_sd: Any, x: Any, y: Any) -> None:
        theta = numpyro.sample("theta", distributions.Normal(0.0, prior_sd).to_event(1))
        numpyro.sample("y", distributions.Categorical(logits=network.logits(theta, x)), obs=y)

    return MCMC(
        NUTS(model, max_tree_depth=sampling.max_tree_depth),
        num_warmup=sampling.draws,
        num_samples=sampling.draws,
        num_chains=sampling.chains,
        chain_method="vectorized",
        jit_model_args=True,
        progress_bar=False,
    )


@lru_cache(maxsize=4)
def _predict(network: Network) -> Any:
    def one(theta: Any, x: Any) -> Any:
        return network.probabilities(theta, x)

    def all_draws(theta: Any, x: Any) -> Any:
        return jax.lax.map(lambda chain: jax.lax.map(lambda draw: one(draw, x), chain), theta)

    return jax.jit(all_draws)
