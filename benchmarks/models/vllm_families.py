"""Tiny random checkpoints of the architectures whose weights a scorer may read in vLLM, and of two it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# vLLM's attention on a CPU asks for a head size of 32 at least; a vocabulary of 301 it pads to 320.
SIZES: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 5,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4}
# Name -> transformers' model type, and settings beside the sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {"tie_word_embeddings": False}),
    "Llama, tied": ("llama", {"tie_word_embeddings": True}),
    "Mistral": ("mistral", {"sliding_window": 4}),
    "Qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", {}),
    "Gemma 3": (
        "gemma3_text",
        {
            "query_pre_attn_scalar": 32,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "Phi-3": ("phi3", {}),
    "OLMo 2": ("olmo2", {}),
    "Granite": ("granite", {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "SmolLM3": ("smollm3", {}),
    "GPT-2": ("gpt2", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "Mixtral": ("mixtral", EXPERTS),
    "Qwen3-MoE": ("qwen3_moe", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 64}),
}
REFUSED = ("Mixtral", "Qwen3-MoE")


def save_tiny(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a random float32 checkpoint in which no bias is zero and no norm weight one."""
    model_type, settings = FAMILIES[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return folder
