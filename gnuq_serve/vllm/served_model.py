"""What an engine has loaded, read off vLLM's configuration."""

from __future__ import annotations

from typing import Any

from gnuq_serve.service.service import ServedModel


def served_model(model_config: Any) -> ServedModel:
    """The scorer's view of vLLM's ``ModelConfig``."""
    overrides = model_config.hf_overrides
    return ServedModel(
        model=str(model_config.model),
        dtype=str(model_config.dtype).removeprefix("torch."),
        revision=model_config.revision,
        trust_remote_code=bool(model_config.trust_remote_code),
        config_overrides=dict(overrides) if isinstance(overrides, dict) else {},
        raw_logprobs=model_config.logprobs_mode == "raw_logprobs",
    )
