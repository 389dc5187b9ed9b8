"""Linear layers: ``nn.Linear``, GPT-2's transposed ``Conv1D``, routers of experts; with or without bias.

For one sample with inputs ``a`` (T x d_in) and output gradients ``delta`` (T x d_out)::

    ||grad W||^2 = ||delta^T a||^2 = sum_{s,t} (a a^T)_{st} (delta delta^T)_{st},   grad b = sum_t delta_t

The second form ("ghost norm": Goodfellow, arXiv:1510.01799; for sequences Li et al., arXiv:2110.05679) never
forms the gradient. It is cheaper while the sequence is short; past that, the first runs in tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from gnuq_serve.gradnorm.gram import work
from gnuq_serve.gradnorm.layer_call import LayerCall, as_rows
from gnuq_serve.gradnorm.registry import register

TILE_BYTES = 64 * 2**20


@register(
    nn.Linear,
    "transformers.pytorch_utils.Conv1D",
    "transformers.models.falcon.modeling_falcon.FalconLinear",
    # Routers return their logits first, and go on from that very tensor.
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssTopKRouter",
    "transformers.models.mixtral.modeling_mixtral.MixtralTopKRouter",
    "transformers.models.olmoe.modeling_olmoe.OlmoeTopKRouter",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeTopKRouter",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter",
)
def linear(layer: nn.Module, call: LayerCall, delta: Tensor) -> Tensor:
    """``y = W a + b``; a transposed weight has the same norm."""
    norm_sq = weight_norm_sq(call, delta)
    return norm_sq if getattr(layer, "bias", None) is None else norm_sq + bias_norm_sq(delta)


def weight_norm_sq(call: LayerCall, delta: Tensor) -> Tensor:
    """``||delta^T a||^2`` of each sample, (B,), for the inputs ``a`` of a call."""
    delta_rows = as_rows(delta)
    tokens, d_out = delta_rows.shape[1:]
    d_in = call.tensor.shape[-1]
    if tokens * (d_in / call.readers + d_out) * work(tokens) < d_in * d_out:
        return call.gram().inner(delta_rows)
    return _tiled_norm_sq(as_rows(call.tensor), delta_rows)


def bias_norm_sq(delta: Tensor) -> Tensor:
    """``||sum_t delta_t||^2`` of each sample, (B,)."""
    return as_rows(delta).sum(1).square().sum(-1)


def _tiled_norm_sq(rows: Tensor, delta_rows: Tensor) -> Tensor:
    """``||delta^T a||^2`` for each sample, never more than ``TILE_BYTES`` of the gradient at a time."""
    tile = max(1, TILE_BYTES // (rows.shape[-1] * rows.element_size()))
    return torch.stack(
        [
            torch.stack([vector_norm(part.mT @ a).square() for part in delta.split(tile, dim=-1)]).sum()
            for a, delta in zip(rows.unbind(), delta_rows.unbind(), strict=True)
        ]
    )
