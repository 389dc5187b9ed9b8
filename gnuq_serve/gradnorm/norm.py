"""Normalisation layers scale (and shift) a normalised input: ``y = w * x_hat + b`` or ``y = (1 + w) * x_hat``.

``grad w = sum_t x_hat_t * delta_t`` and ``grad b = sum_t delta_t``, elementwise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gnuq_serve.gradnorm.layer_call import LayerCall, as_rows
from gnuq_serve.gradnorm.registry import register


@register(
    nn.LayerNorm,
    nn.RMSNorm,
    "transformers.models.cohere.modeling_cohere.CohereLayerNorm",
    "transformers.models.cohere2.modeling_cohere2.Cohere2LayerNorm",
    "transformers.models.ernie4_5.modeling_ernie4_5.Ernie4_5RMSNorm",
    "transformers.models.exaone4.modeling_exaone4.Exaone4RMSNorm",
    "transformers.models.glm.modeling_glm.GlmRMSNorm",
    "transformers.models.glm4.modeling_glm4.Glm4RMSNorm",
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssRMSNorm",
    "transformers.models.granite.modeling_granite.GraniteRMSNorm",
    "transformers.models.llama.modeling_llama.LlamaRMSNorm",
    "transformers.models.ministral.modeling_ministral.MinistralRMSNorm",
    "transformers.models.mistral.modeling_mistral.MistralRMSNorm",
    "transformers.models.mixtral.modeling_mixtral.MixtralRMSNorm",
    "transformers.models.olmo2.modeling_olmo2.Olmo2RMSNorm",
    "transformers.models.olmo3.modeling_olmo3.Olmo3RMSNorm",
    "transformers.models.olmoe.modeling_olmoe.OlmoeRMSNorm",
    "transformers.models.phi3.modeling_phi3.Phi3RMSNorm",
    "transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeRMSNorm",
    "transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeRMSNorm",
    "transformers.models.smollm3.modeling_smollm3.SmolLM3RMSNorm",
)
def scaled_norm(layer: nn.Module, call: LayerCall, delta: Tensor) -> Tensor:
    """RMSNorm and LayerNorm, over the last dimension or (torch's own) the last few."""
    return _norm_sq(layer, call, delta, neutral=1)


@register(
    "transformers.models.gemma.modeling_gemma.GemmaRMSNorm",
    "transformers.models.gemma2.modeling_gemma2.Gemma2RMSNorm",
    "transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm",
)
def one_plus_norm(layer: nn.Module, call: LayerCall, delta: Tensor) -> Tensor:
    """Gemma's RMSNorm, which scales by ``1 + w``."""
    return _norm_sq(layer, call, delta, neutral=0)


def _norm_sq(layer: nn.Module, call: LayerCall, delta: Tensor, neutral: int) -> Tensor:
    own = dict(layer.named_parameters(recurse=False))
    # The layer itself with a neutral weight and no shift gives x_hat in exactly its own arithmetic.
    parameters = {
        name: torch.full_like(parameter, neutral if name == "weight" else 0) for name, parameter in own.items()
    }
    x_hat = functional_call(layer, parameters, (call.tensor,))
    dimensions = own["weight"].dim()  # query and key norms may have a weight for each head
    delta_rows = as_rows(delta.flatten(-dimensions))
    norm_sq = (as_rows(x_hat.flatten(-dimensions)) * delta_rows).sum(1).square().sum(-1)
    if "bias" in own:
        norm_sq = norm_sq + delta_rows.sum(1).square().sum(-1)
    return norm_sq
