"""Attention sinks (gpt-oss): one learned logit for each head, in the softmax but without a value.

With weights ``w_tj = exp(a_tj) / (exp(s) + sum_j exp(a_tj))`` the sink takes ``p_t = 1 - sum_j w_tj``, and::

    dl/ds = sum_{t,j} delta_tj dw_tj/ds = -sum_t p_t sum_j w_tj delta_tj

where ``delta`` is the gradient at the attention weights. Only eager attention returns them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gnuq_serve.gradnorm.layer_call import LayerCall, accumulation_dtype
from gnuq_serve.gradnorm.registry import register


def _obstacle(layer: Any) -> str | None:
    chosen = layer.config._attn_implementation
    if chosen == "eager":
        return None
    return f'attention sinks need the attention weights, which {chosen!r} does not return: load it with "eager"'


@register(
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssAttention",
    parameters=("sinks",),
    output=1,
    keep_output=True,
    obstacle=_obstacle,
)
def sinks(_layer: Any, call: LayerCall, delta: Tensor) -> Tensor:
    """From attention weights (B, heads, T, S) and the gradient there.

    Raises:
        RuntimeError: it is not attention weights that the layer returned.
    """
    if call.output is None or call.output.dim() != 4:
        raise RuntimeError("the attention returned something else than its weights: use eager attention")
    delta = delta.to(accumulation_dtype(delta))
    weights = call.output.to(delta.dtype)
    gradient = ((1 - weights.sum(-1)) * (weights * delta).sum(-1)).sum(-1)
    return gradient.square().sum(-1)
