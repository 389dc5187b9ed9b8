"""Tiny random models of several families, for tests of the whole pass, and samples for them."""

from typing import Any

import torch
from models import sizes
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {**sizes.SIZES, "intermediate_size": 56, "num_hidden_layers": 3}
# Windows shorter than the prompts, and layers with and without one; experts in the one implementation that
# takes float64.
WINDOWS: dict[str, Any] = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
EXPERTS: dict[str, Any] = {"experts_implementation": "eager", "num_experts_per_tok": 2, "num_local_experts": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, **WINDOWS},
    "gpt2": {},
    "gpt_neox": {},
    "mixtral": EXPERTS,
    "gpt_oss": {"head_dim": 8, **WINDOWS, **EXPERTS},
}

PROMPT = [1, 5, 12, 40, 12, 13, 60, 61, 12, 7, 9]
ANSWER = [14, 12, 12, 90, 60, 5, 2]
SAMPLES = [
    (PROMPT, ANSWER),
    ([7], [8]),
    ([7], [8, 7, 7, 11]),
    ([3, 9, 27, 3, 3, 60], [9]),
    ([50, 51, 52], [5, 53, 5, 2]),
]


def tiny(family: str, *, tied: bool = False, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A model in eval mode, every parameter of it moved by ``0.1 randn`` so that none is zero or one."""
    options = {**SIZES, "tie_word_embeddings": tied, **FAMILIES.get(family, {}), **settings}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def worst(actual: Any, expected: Any) -> float:
    """Largest relative difference of two sequences of numbers."""
    return max(abs(float(a) / float(e) - 1) for a, e in zip(actual, expected, strict=True))
