"""Attention for the oracle that takes keys and values of the first positions as constants.

The oracle's is a whole forward pass without a cache, so that it shares nothing with the caches it judges.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "constant_keys_and_values"


@contextmanager
def constant_keys_and_values(model: nn.Module, positions: int) -> Iterator[None]:
    """Inside, no gradient enters the keys and values of the first ``positions`` positions of ``model``.

    Raises:
        RuntimeError: no layer took its attention from transformers' registry, so that nothing was held constant.
    """
    config: Any = model.config
    usual = config._attn_implementation
    used = False

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal used
        used = True
        run = (
            sys.modules[type(module).__module__].eager_attention_forward
            if usual == "eager"
            else AttentionInterface()[usual]
        )
        return run(module, query, _constant(key, positions), _constant(value, positions), *args, **kwargs)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()[usual])
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = usual
        AttentionInterface._global_mapping.pop(NAME)
        AttentionMaskInterface._global_mapping.pop(NAME)
    if not used:
        raise RuntimeError(f"{type(model).__name__} does not take its attention from transformers' registry")


def _constant(tensor: Tensor, positions: int) -> Tensor:
    """(B, heads, T, d), the first positions detached."""
    return torch.cat([tensor[:, :, :positions].detach(), tensor[:, :, positions:]], dim=2)
