"""Which rule belongs to which layer type.

A rule turns what one layer saw into the squared norm of its parameters' gradient, for each sample of a batch::

    @register(MyScale, parameters=("weight",))
    def my_scale(layer, call, delta):            # y = weight * x
        gradient = (call.tensor * delta).flatten(1, -2).sum(1)
        return gradient.square().sum(-1)

Types are matched exactly: a subclass may compute something else, and would silently get a wrong number.
A rule is plain torch without writing in place, so that ``torch.vmap`` can run it for many tokens at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from gnuq_serve.gradnorm.layer_call import LayerCall


class RuleFunction(Protocol):
    """One signature for every layer type."""

    def __call__(self, layer: nn.Module, call: LayerCall, delta: Tensor, /) -> Tensor:
        """Squared norm of the gradient of all the layer's own parameters.

        Args:
            layer: the module.
            call: what it was given; ``call.tensor`` is (B, T, ...) activations or (B, T) ids.
            delta: gradient of the log-probability at the layer's output, (B, T, ..., d_out).

        Returns:
            (B,) in the accumulation dtype: float32, or float64 where the model is float64.
        """
        ...


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule, the names of the layer's own parameters that it counts, and what it asks for.

    Attributes:
        name: the function's name.
        function: the rule.
        parameters: names of the layer's own parameters that it counts.
        output: which output's gradient it takes, where the layer returns several.
        keep_output: it also needs that output's value (``call.output``).
        keep_arguments: it also needs everything that the layer was called with (``call.args``, ``call.kwargs``).
        every_output: it takes a list of the gradients at all outputs, as the layer's caller sees them.
        obstacle: says what keeps the rule from holding for a layer as it is set up, or None.
    """

    name: str
    function: RuleFunction
    parameters: frozenset[str]
    output: int = 0
    keep_output: bool = False
    keep_arguments: bool = False
    every_output: bool = False
    obstacle: Callable[[nn.Module], str | None] | None = None


_rules: dict[str, Rule] = {}


def register(
    *layer_types: type[nn.Module] | str,
    parameters: tuple[str, ...] = ("weight", "bias"),
    output: int = 0,
    keep_output: bool = False,
    keep_arguments: bool = False,
    obstacle: Callable[[nn.Module], str | None] | None = None,
) -> Callable[[RuleFunction], RuleFunction]:
    """Register a rule for layer types, given as classes or by dotted name (so that nothing is imported).

    Args:
        layer_types: what the rule is for.
        parameters: names of the layer's own parameters that it counts.
        output: which output's gradient it takes, where the layer returns several.
        keep_output: give it that output's value too, as ``call.output``.
        keep_arguments: give it all arguments of the call too, as ``call.args`` and ``call.kwargs``.
        obstacle: where it returns a text for a layer, the model is refused with that text.
    """

    def decorate(function: RuleFunction) -> RuleFunction:
        name = getattr(function, "__name__", type(function).__name__)
        for layer_type in layer_types:
            key = layer_type if isinstance(layer_type, str) else _dotted(layer_type)
            _rules[key] = Rule(
                name,
                function,
                frozenset(parameters),
                output=output,
                keep_output=keep_output,
                keep_arguments=keep_arguments,
                obstacle=obstacle,
            )
        return function

    return decorate


def rule_for(layer: nn.Module) -> Rule | None:
    """The rule of exactly this layer's type, or None."""
    return _rules.get(_dotted(type(layer)))


def _dotted(layer_type: type) -> str:
    return f"{layer_type.__module__}.{layer_type.__qualname__}"
