"""The numbers of an uncertainty that a probability of being correct can be fitted from; numpy and math only.

``free`` ones come with the forward pass (the engine's own logprobs would give most of them), ``gradient``
ones need the gradient pass, ``semantic`` ones its second backward pass (SemGrad and its relatives,
arXiv:2605.04638). Positive numbers that span orders of magnitude enter as logarithms. Log-probabilities and
entropies do both, as they are and as logarithms: what is linear in the log-odds of being right differs from
task to task, and a wrong shape makes a good signal look worse than one that ranks worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from gnuq_serve.uncertainty import Uncertainty, log_or_none

Kind = Literal["free", "gradient", "semantic"]


@dataclass(frozen=True, slots=True)
class Feature:
    """One number of an uncertainty: its name, what it costs, and how it is read (None: not there).

    ``of``: the feature of which this is another shape, with the same order of answers.
    """

    name: str
    kind: Kind
    read: Callable[[Uncertainty], float | None]
    of: str | None = None


def _field(name: str) -> Callable[[Uncertainty], float | None]:
    return lambda uncertainty: getattr(uncertainty, name, None)


def _signal(name: str) -> Callable[[Uncertainty], float | None]:
    return lambda uncertainty: getattr(uncertainty.signals, name, None)


def _log_signal(name: str) -> Callable[[Uncertainty], float | None]:
    return lambda uncertainty: log_or_none(getattr(uncertainty.signals, name, None))


def _log_size(read: Callable[[Uncertainty], float | None]) -> Callable[[Uncertainty], float | None]:
    """The logarithm of the absolute value, at least 1e-4: a probability of exactly 1 is as sure as .9999."""

    def read_log(uncertainty: Uncertainty) -> float | None:
        value = read(uncertainty)
        return None if value is None else math.log(max(abs(value), 1e-4))

    return read_log


def _mean_log_probability(uncertainty: Uncertainty) -> float | None:
    if uncertainty.log_probability is None or not uncertainty.tokens:
        return None
    return uncertainty.log_probability / uncertainty.tokens


def _log_tokens(uncertainty: Uncertainty) -> float | None:
    return math.log(uncertainty.tokens) if uncertainty.tokens else None


def _log_mean_grad_norm_sq(uncertainty: Uncertainty) -> float | None:
    """``log ||grad (l / T)||^2 = log ||grad l||^2 - 2 log T``."""
    if uncertainty.log_grad_norm_sq is None or not uncertainty.tokens:
        return None
    return uncertainty.log_grad_norm_sq - 2.0 * math.log(uncertainty.tokens)


FEATURES: dict[str, Feature] = {
    feature.name: feature
    for feature in (
        Feature("log_probability", "free", _field("log_probability")),
        Feature("mean_log_probability", "free", _mean_log_probability),
        Feature("min_token_log_probability", "free", _signal("min_token_log_probability")),
        Feature("entropy", "free", _field("entropy")),
        Feature("max_entropy", "free", _signal("max_entropy")),
        Feature("first_entropy", "free", _signal("first_entropy")),
        Feature("log_tokens", "free", _log_tokens),
        Feature("log_surprisal", "free", _log_size(_field("log_probability")), "log_probability"),
        Feature("log_mean_surprisal", "free", _log_size(_mean_log_probability), "mean_log_probability"),
        Feature(
            "log_max_surprisal",
            "free",
            _log_size(_signal("min_token_log_probability")),
            "min_token_log_probability",
        ),
        Feature("log_entropy", "free", _log_size(_field("entropy")), "entropy"),
        Feature("log_max_entropy", "free", _log_size(_signal("max_entropy")), "max_entropy"),
        Feature("log_first_entropy", "free", _log_size(_signal("first_entropy")), "first_entropy"),
        Feature("log_grad_norm_sq", "gradient", _field("log_grad_norm_sq")),
        Feature("log_mean_grad_norm_sq", "gradient", _log_mean_grad_norm_sq),
        Feature("log_input_grad_norm_sq", "gradient", _signal("log_input_grad_norm_sq")),
        Feature("log_hidden_grad", "gradient", _signal("log_hidden_grad")),
        Feature("log_semgrad", "semantic", _log_signal("semgrad")),
        Feature("log_exgrad", "semantic", _log_signal("exgrad")),
        Feature("log_paragrad", "semantic", _log_signal("paragrad")),
        Feature("log_hybridgrad", "semantic", _log_signal("hybridgrad")),
    )
}


def read_features(uncertainty: Uncertainty, names: Iterable[str]) -> list[float | None]:
    """The named features of one uncertainty, None for what is missing or not finite.

    Raises:
        KeyError: a name that is no feature.
    """
    values = []
    for name in names:
        value = FEATURES[name].read(uncertainty)
        values.append(float(value) if value is not None and math.isfinite(value) else None)
    return values
