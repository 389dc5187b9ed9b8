"""Which rule belongs to which layer type.

A rule turns what one layer saw into the squared norm of its parameters' gradient, for each sample of a batch::

    @register(MyScale, parameters=("weight",))
    def my_scale(layer, inputs, delta):          # y = weight * x
        gradient = (inputs.tensor * delta).flatten(1, -2).sum(1)
        return gradient.square().sum(-1)

Types are matched exactly: a subclass may compute something else, and would silently get a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from gnuq_serve.gradnorm.layer_input import LayerInput


class RuleFunction(Protocol):
    """One signature for every layer type."""

    def __call__(self, layer: nn.Module, inputs: LayerInput, delta: Tensor, /) -> Tensor:
        """Squared norm of the gradient of all the layer's own parameters.

        Args:
            layer: the module.
            inputs: its input, (B, T, ...) activations or (B, T) ids.
            delta: gradient of the log-probability at the layer's output, (B, T, ..., d_out).

        Returns:
            (B,) in the accumulation dtype: float32, or float64 where the model is float64.
        """
        ...


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule and the names of the layer's own parameters that it counts."""

    name: str
    function: RuleFunction
    parameters: frozenset[str]


_rules: dict[str, Rule] = {}


def register(
    *layer_types: type[nn.Module] | str, parameters: tuple[str, ...] = ("weight", "bias")
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule for layer types, given as classes or by dotted name (so that nothing is imported)."""

    def decorate(function: RuleFunction) -> RuleFunction:
        name = getattr(function, "__name__", type(function).__name__)
        for layer_type in layer_types:
            key = layer_type if isinstance(layer_type, str) else _dotted(layer_type)
            _rules[key] = Rule(name, function, frozenset(parameters))
        return function

    return decorate


def rule_for(layer: nn.Module) -> Rule | None:
    """The rule of exactly this layer's type, or None."""
    return _rules.get(_dotted(type(layer)))


def _dotted(layer_type: type) -> str:
    return f"{layer_type.__module__}.{layer_type.__qualname__}"
