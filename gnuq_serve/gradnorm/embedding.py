"""Embeddings: a row's gradient is the sum of the output gradients of all positions that read it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gnuq_serve.gradnorm.layer_call import LayerCall, accumulation_dtype
from gnuq_serve.gradnorm.registry import register


@register(
    nn.Embedding,
    "transformers.models.gemma.modeling_gemma.GemmaTextScaledWordEmbedding",
    "transformers.models.gemma2.modeling_gemma2.Gemma2TextScaledWordEmbedding",
    "transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding",
)
def embedding(layer: nn.Module, call: LayerCall, delta: Tensor) -> Tensor:
    """``c^2 sum_{s,t : id_s = id_t} delta_s . delta_t``, by summing the positions of each row first.

    ``c`` is the scale that some layers (Gemma's) put on the row they read, 1 elsewhere. The row of
    ``padding_idx`` counts like any other: the derivative there is not zero, autograd only drops it.
    """
    samples = call.tensor.shape[0]
    ids = call.tensor.flatten(1)
    rows = int(layer.num_embeddings)  # type: ignore[arg-type]
    keys = (ids + rows * ids.new_tensor(range(samples)).unsqueeze(1)).flatten()
    used, where = keys.unique(return_inverse=True)
    source = scaled(layer, delta).flatten(0, -2)
    gradient = torch.index_add(source.new_zeros((len(used), source.shape[-1])), 0, where, source)
    return torch.index_add(gradient.new_zeros(samples), 0, used // rows, gradient.square().sum(-1))


def scaled(layer: nn.Module, delta: Tensor) -> Tensor:
    """``c delta``, in the accumulation dtype: the gradient at the rows that were read."""
    scale = getattr(layer, "embed_scale", None)
    delta = delta.to(accumulation_dtype(delta))
    # The layer rounds its scale to the weight's dtype first.
    return delta if scale is None else delta * scale.to(layer.weight.dtype).to(delta.dtype)
