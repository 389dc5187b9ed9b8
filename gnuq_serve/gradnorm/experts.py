"""Mixtures of experts whose weights are fused in 3-D parameters, ``gate_up_proj`` and ``down_proj``.

Each token goes to k experts. Pair i, of token ``t`` and expert ``e``, adds to the output of ``t``::

    w_i (W2_e gate(W1_e x_t + b1_e) + b2_e)

The layer shows neither what the second weight reads nor what comes down to the first. Both are computed again
here, one expert at a time, whatever implementation the model itself runs: one more forward pass of the experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gnuq_serve.gradnorm.layer_call import LayerCall, accumulation_dtype
from gnuq_serve.gradnorm.linear import bias_norm_sq, weight_norm_sq
from gnuq_serve.gradnorm.registry import register


@register(
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts",
    "transformers.models.mixtral.modeling_mixtral.MixtralExperts",
    "transformers.models.olmoe.modeling_olmoe.OlmoeExperts",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeExperts",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts",
    parameters=("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"),
    keep_arguments=True,
)
def experts(layer: Any, call: LayerCall, delta: Tensor) -> Tensor:
    """As ``linear``, for both weights of each expert over the tokens that were sent to it, by sample.

    Reads ``(hidden, top_k_index, top_k_weights)`` from the call: (B * T, d), (B * T, k), (B * T, k).
    """
    _, index, weights = (*call.args, *call.kwargs.values())
    hidden, delta_tokens = call.tensor.flatten(0, -2), delta.flatten(0, -2)
    scale = weights.to(delta.device).flatten()
    shares = [delta_tokens.new_zeros(delta.shape[0], dtype=accumulation_dtype(delta))]
    for e, pairs, by_sample in _by_expert(index.to(delta.device), layer.num_experts, delta.shape[0]):
        tokens = pairs // index.shape[-1]
        x = hidden[tokens]
        bias = layer.gate_up_proj_bias[e] if layer.has_bias else 0
        up = _product(x, layer.gate_up_proj[e], layer.is_transposed) + bias
        h, down_gate = torch.func.vjp(layer._apply_gate, up)  # type: ignore[misc]
        delta_out = (delta_tokens[tokens] * scale[pairs, None]).to(h.dtype)
        delta_h = _product(delta_out, layer.down_proj[e], not layer.is_transposed)
        for inputs, gradient in ((x, down_gate(delta_h)[0]), (h, delta_out)):
            gradient = by_sample(gradient, mask=True)
            shares.append(weight_norm_sq(LayerCall.of(by_sample(inputs)), gradient))
            if layer.has_bias:
                shares.append(bias_norm_sq(gradient))
    return torch.stack(shares).sum(0)


class _Groups:
    """Sorts the rows of one expert into samples: (n, d) -> (B, longest, d)."""

    def __init__(self, starts: Tensor, counts: Tensor, rows: int, longest: int) -> None:
        slots = torch.arange(longest, device=counts.device)
        self._at = (starts[:, None] + slots).clamp(max=rows - 1)
        self._beyond = (slots >= counts[:, None])[..., None]

    def __call__(self, rows: Tensor, mask: bool = False) -> Tensor:
        """With ``mask``, slots that no row belongs to are zero; otherwise they hold any row."""
        grouped = rows[self._at]
        return grouped.masked_fill(self._beyond, 0) if mask else grouped


def _by_expert(index: Tensor, experts: int, samples: int) -> Iterator[tuple[int, Tensor, _Groups]]:
    """For each expert in use: its number, its pairs sorted by sample, and how they fall into samples."""
    chosen = index.flatten()
    sample = torch.arange(len(chosen), device=chosen.device) // (len(chosen) // samples)
    key = chosen * samples + sample
    order = key.argsort(stable=True)
    counts = key.bincount(minlength=experts * samples)[: experts * samples].view(experts, samples)
    starts = counts.cumsum(1) - counts
    # The one place where the host must know what the device found.
    sizes = torch.stack([counts.sum(1), counts.amax(1)], 1).tolist()
    begin = 0
    for e, (rows, longest) in enumerate(sizes):
        if rows:
            yield e, order[begin : begin + rows], _Groups(starts[e], counts[e], rows, longest)
        begin += rows


def _product(rows: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return rows @ (weight if transposed else weight.mT)
