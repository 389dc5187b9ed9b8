"""Embeddings: a row's gradient is the sum of the output gradients of all positions that read it."""

from __future__ import annotations

from torch import Tensor, nn

from gnuq_serve.gradnorm.layer_input import LayerInput, accumulation_dtype
from gnuq_serve.gradnorm.registry import register


@register(nn.Embedding)
def embedding(layer: nn.Module, inputs: LayerInput, delta: Tensor) -> Tensor:
    """``sum_{s,t : id_s = id_t} delta_s . delta_t``, by summing the positions of each row first.

    The row of ``padding_idx`` counts like any other: the derivative there is not zero, autograd only drops it.
    """
    samples = inputs.tensor.shape[0]
    ids = inputs.tensor.flatten(1)
    rows = int(layer.num_embeddings)  # type: ignore[arg-type]
    keys = (ids + rows * ids.new_tensor(range(samples)).unsqueeze(1)).flatten()
    used, where = keys.unique(return_inverse=True)
    dtype = accumulation_dtype(delta)
    gradient = delta.new_zeros((len(used), delta.shape[-1]), dtype=dtype)
    gradient.index_add_(0, where, delta.flatten(0, -2).to(dtype))
    norm_sq = gradient.new_zeros(samples)
    return norm_sq.index_add_(0, used // rows, gradient.square().sum(-1))
