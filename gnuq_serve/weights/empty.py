"""A model without memory: its structure, and the shapes of its parameters."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM


def empty_model(config: Any, *, dtype: torch.dtype | None, trust_remote_code: bool) -> Any:
    """The transformers model of a configuration on the meta device; nothing is tied yet.

    Args:
        config: the model's.
        dtype: of its parameters; None: the configuration's.
        trust_remote_code: run code that comes with the checkpoint.
    """
    chosen = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **chosen)
