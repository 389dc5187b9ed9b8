"""Linear layers: ``nn.Linear`` and GPT-2's transposed ``Conv1D``; with or without bias.

For one sample with inputs ``a`` (T x d_in) and output gradients ``delta`` (T x d_out)::

    ||grad W||^2 = ||delta^T a||^2 = sum_{s,t} (a a^T)_{st} (delta delta^T)_{st},   grad b = sum_t delta_t

The second form ("ghost norm": Goodfellow, arXiv:1510.01799; for sequences Li et al., arXiv:2110.05679) never
forms the gradient. It is cheaper while the sequence is short; past that, the first runs in tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gnuq_serve.gradnorm.layer_input import LayerInput, as_rows
from gnuq_serve.gradnorm.registry import register

TILE_BYTES = 64 * 2**20


@register(nn.Linear, "transformers.pytorch_utils.Conv1D")
def linear(layer: nn.Module, inputs: LayerInput, delta: Tensor) -> Tensor:
    """``y = W a + b``; a transposed weight has the same norm."""
    delta_rows = as_rows(delta)
    tokens, d_out = delta_rows.shape[1:]
    d_in = inputs.tensor.shape[-1]
    if tokens * (d_in / inputs.readers + d_out) < d_in * d_out:
        norm_sq = (inputs.gram() * (delta_rows @ delta_rows.mT)).sum((1, 2))
    else:
        norm_sq = _tiled_norm_sq(as_rows(inputs.tensor), delta_rows)
    if getattr(layer, "bias", None) is not None:
        norm_sq = norm_sq + delta_rows.sum(1).square().sum(-1)
    return norm_sq


def _tiled_norm_sq(rows: Tensor, delta_rows: Tensor) -> Tensor:
    """``||delta^T a||^2`` for each sample, never more than ``TILE_BYTES`` of the gradient at a time."""
    samples, _, d_in = rows.shape
    tile = max(1, TILE_BYTES // (d_in * rows.element_size()))
    norm_sq = rows.new_zeros(samples)
    for i in range(samples):
        for columns in delta_rows[i].split(tile, dim=-1):
            norm_sq[i] += torch.linalg.vector_norm(columns.mT @ rows[i]).square()
    return norm_sq
