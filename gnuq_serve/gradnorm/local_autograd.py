"""The slow exact path: a layer that no rule knows is run again, and autograd differentiates its own parameters.

It holds for any layer whose output depends on nothing but its arguments and its parameters. It costs another
forward and backward of that layer, and memory for its own parameters' gradient; one sample at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gnuq_serve.gradnorm.layer_call import LayerCall, accumulation_dtype
from gnuq_serve.gradnorm.registry import Rule


def slow_rule(parameters: frozenset[str]) -> Rule:
    """The rule of the slow path for a layer with these parameters of its own."""
    return Rule("local_autograd", local_autograd, parameters, keep_arguments=True, every_output=True)


def local_autograd(layer: nn.Module, call: LayerCall, deltas: Any) -> Tensor:
    """Squared norm of the gradient of the layer's own parameters, (1,), for the one sample of the call.

    ``deltas`` are the gradients at all tensors that the layer returned, as its caller sees them, None where
    there is none.
    """
    own = {name: p.detach().requires_grad_() for name, p in layer.named_parameters(recurse=False)}
    with torch.enable_grad(), _without_padding_idx(layer):
        outputs = tensors_of(functional_call(layer, own, call.args, dict(call.kwargs)))
        pairs = [(o, d) for o, d in zip(outputs, deltas, strict=True) if d is not None and o.requires_grad]
        if not pairs:  # what it returns does not depend on its parameters
            return torch.zeros(1, device=call.tensor.device)
        gradients = torch.autograd.grad(
            [o for o, _ in pairs], list(own.values()), [d for _, d in pairs], allow_unused=True
        )
    shares = [g.to(accumulation_dtype(g)).square().sum() for g in gradients if g is not None]
    return torch.stack(shares).sum()[None]


@contextmanager
def _without_padding_idx(layer: nn.Module) -> Iterator[None]:
    """An embedding's autograd drops the gradient of that row; the derivative there is not zero."""
    row = getattr(layer, "padding_idx", None)
    if row is None:
        yield
        return
    layer.padding_idx = None  # type: ignore[assignment]
    try:
        yield
    finally:
        layer.padding_idx = row


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors that a layer returned: itself, or the members of a tuple or list."""
    members = output if isinstance(output, (tuple, list)) else (output,)
    return [member for member in members if isinstance(member, Tensor)]
