"""The classifiers: two hidden layers of equal width, tanh, softmax; all weights in one vector.

The vector holds each layer's weight (out x in, row by row), then its bias: the order of torch's
``parameters_to_vector``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gnuq_serve.calibration.arrays import FloatArray

# Posteriors and trained weights are compared to many digits.
jax.config.update("jax_enable_x64", True)


@dataclass(frozen=True, slots=True)
class Network:
    """A shape; its weights are given to each call.

    Attributes:
        width: of both hidden layers.
        classes: C.
        inputs: dimensions of an input.
    """

    width: int
    classes: int
    inputs: int = 2

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of each layer."""
        return ((self.width, self.inputs), (self.width, self.width), (self.classes, self.width))

    @property
    def parameters(self) -> int:
        """P, the number of weights and biases."""
        return sum(out * inner + out for out, inner in self.layers)

    def logits(self, theta: Any, x: Any) -> Any:
        """(P,) weights and (N, 2) inputs to (N, C) logits, in JAX."""
        at, last = 0, len(self.layers) - 1
        for index, (out, inner) in enumerate(self.layers):
            weight = theta[at : at + out * inner].reshape(out, inner)
            bias = theta[at + out * inner : at + out * inner + out]
            x = x @ weight.T + bias
            x = x if index == last else jnp.tanh(x)
            at += out * inner + out
        return x

    def probabilities(self, theta: Any, x: Any) -> Any:
        """(N, C) softmax of `logits`."""
        return jax.nn.softmax(self.logits(theta, x))

    def per_weight(self, prior: str) -> FloatArray:
        """(P,) standard deviations of the prior: ``unit``, or ``fan_in`` (weights ``fan_in**-0.5``, biases 1)."""
        if prior == "unit":
            return np.ones(self.parameters)
        parts = []
        for out, inner in self.layers:
            parts += [np.full(out * inner, inner**-0.5), np.ones(out)]
        return np.concatenate(parts)
