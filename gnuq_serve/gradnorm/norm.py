"""Normalisation layers that scale (and shift) a normalised input: ``y = w * x_hat + b``.

``grad w = sum_t x_hat_t * delta_t`` and ``grad b = sum_t delta_t``, elementwise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gnuq_serve.gradnorm.layer_input import LayerInput, as_rows
from gnuq_serve.gradnorm.registry import register


@register(
    nn.LayerNorm,
    nn.RMSNorm,
    "transformers.models.llama.modeling_llama.LlamaRMSNorm",
    "transformers.models.mistral.modeling_mistral.MistralRMSNorm",
    "transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm",
)
def scaled_norm(layer: nn.Module, inputs: LayerInput, delta: Tensor) -> Tensor:
    """RMSNorm and LayerNorm, over the last dimension or (torch's own) the last few."""
    neutral = {
        name: torch.ones_like(parameter) if name == "weight" else torch.zeros_like(parameter)
        for name, parameter in layer.named_parameters(recurse=False)
    }
    # The layer itself with weight 1 and bias 0 gives x_hat in exactly its own arithmetic.
    x_hat = functional_call(layer, neutral, (inputs.tensor,))
    dimensions = len(getattr(layer, "normalized_shape", (0,)))
    x_hat, delta = x_hat.flatten(-dimensions), delta.flatten(-dimensions)
    delta_rows = as_rows(delta)
    norm_sq = (as_rows(x_hat) * delta_rows).sum(1).square().sum(-1)
    if "bias" in neutral:
        norm_sq = norm_sq + delta_rows.sum(1).square().sum(-1)
    return norm_sq
