"""Tiny random models of every architecture whose layers all have a rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from models.sizes import SIZES

VOCABULARY: int = SIZES["vocab_size"]
# Windows shorter than the samples, and one layer with and one without.
WINDOW: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
# The one implementation of experts that takes float64.
EXPERTS: dict[str, Any] = {"experts_implementation": "eager", "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Architecture:
    """One architecture, and the settings that make a tiny model of it.

    Attributes:
        model_type: transformers' name of it.
        settings: beside, or instead of, ``SIZES``.
        tolerance: largest relative error to expect of a float64 model. Most architectures compute a little in
            float32 whatever the model's dtype; where autograd itself sums in float32 there, or padding changes
            what is rounded, more is lost.
    """

    name: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-9

    def config(self, tied: bool) -> Any:
        """Of a tiny model, with head and embedding tied or not."""
        return AutoConfig.for_model(self.model_type, **{**SIZES, **self.settings, "tie_word_embeddings": tied})

    def build(self, tied: bool) -> nn.Module:
        """A random float64 model in which no bias is zero and no norm weight one."""
        torch.manual_seed(0)
        model: nn.Module = AutoModelForCausalLM.from_config(self.config(tied))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.double().eval()


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("Llama", "llama", {"attention_bias": True, "mlp_bias": True}),
        Architecture("Mistral", "mistral", {"sliding_window": 4}),
        Architecture("Ministral", "ministral", {"head_dim": 8, **WINDOW}),
        Architecture("Qwen2", "qwen2"),
        Architecture("Qwen3", "qwen3", {"head_dim": 8}),
        Architecture("Gemma", "gemma", {"head_dim": 8}, tolerance=1e-7),
        Architecture("Gemma 2", "gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, **WINDOW}, tolerance=1e-7),
        Architecture(
            "Gemma 3", "gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, **WINDOW}, tolerance=1e-7
        ),
        Architecture("Phi", "phi", {"qk_layernorm": True}),
        Architecture("Phi-3", "phi3"),
        Architecture("OLMo", "olmo"),
        Architecture("OLMo 2", "olmo2"),
        Architecture("OLMo 3", "olmo3", WINDOW),
        Architecture(
            "Granite", "granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}
        ),
        Architecture("SmolLM3", "smollm3"),
        Architecture("Cohere", "cohere", {"logit_scale": 0.25, "use_qk_norm": True}, tolerance=1e-7),
        Architecture("Cohere 2", "cohere2", {"logit_scale": 0.25, **WINDOW}, tolerance=1e-7),
        Architecture("StableLM", "stablelm", {"qk_layernorm": True, "use_qkv_bias": True}),
        Architecture("StarCoder2", "starcoder2"),
        Architecture("GLM", "glm", {"head_dim": 8}),
        Architecture("GLM-4", "glm4", {"head_dim": 8}),
        Architecture("ERNIE 4.5", "ernie4_5", {"use_bias": True}),
        Architecture("EXAONE 4", "exaone4", {"sliding_window": 4}),
        Architecture("GPT-2", "gpt2"),
        Architecture("GPT-NeoX (Pythia)", "gpt_neox"),
        Architecture("Falcon", "falcon", {"bias": True, "alibi": False}),
        Architecture("Falcon, new decoder", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        Architecture("MPT", "mpt", tolerance=1e-6),
        Architecture("Mixtral", "mixtral", {**EXPERTS, "num_local_experts": 4}),
        Architecture(
            "Qwen2-MoE",
            "qwen2_moe",
            {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
        ),
        Architecture(
            "Qwen3-MoE", "qwen3_moe", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}
        ),
        Architecture("OLMoE", "olmoe", {**EXPERTS, "num_experts": 4}),
        Architecture("gpt-oss", "gpt_oss", {**EXPERTS, "num_local_experts": 4, "head_dim": 8, **WINDOW}),
    )
}
