"""Adapters put into a model by PEFT: which of their layers are in use, and which can't be counted.

A LoRA adapter in use is made of linear layers, counted like any others, beside the base weights. PEFT itself is
not imported: its layers are known by the attributes that they all have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_MERGE = "merge it into the weights first (PeftModel.merge_and_unload)"


def inactive_adapters(model: nn.Module) -> set[nn.Module]:
    """All modules of adapters that are switched off, not chosen, or merged into the base weights."""
    unused: set[nn.Module] = set()
    for layer in filter(_is_adapted, model.modules()):
        active = _active(layer)
        chosen = False
        for container in _containers(layer):
            in_use = set(active) & set(container.keys())
            chosen |= bool(in_use)
            for name in container.keys() - in_use:
                unused.update(container[name].modules())
        # The wrapper of a module that was trained in full keeps the original beside the copies.
        original = getattr(layer, "original_module", None)
        if chosen and isinstance(original, nn.Module):
            unused.update(original.modules())
    return unused


def adapter_obstacle(layer: nn.Module, head: nn.Module, embedding: nn.Module) -> str | None:
    """What keeps this layer from being counted, or None."""
    if isinstance(layer, (nn.ParameterDict, nn.ParameterList)) and len(layer):
        return f"parameters in a {type(layer).__name__} are read by the layer around it, and no rule sees how"
    if any(getattr(c, "is_prompt_learning", False) for c in dict(getattr(layer, "peft_config", {})).values()):
        return "learned prompts (prompt, prefix and P-tuning) are not supported"
    if not _is_adapted(layer):
        return None
    if layer in (head, embedding):
        return f"an adapter on the {'head' if layer is head else 'embedding'} is not supported: {_MERGE}"
    active = _active(layer)
    if active and hasattr(layer, "parameter_name"):
        return f"adapters of single parameters (target_parameters) are not supported: {_MERGE}"
    if set(active) & set(getattr(layer, "lora_variant", {})):
        return f"only plain LoRA is supported, not variants such as DoRA: {_MERGE}"
    return None


def _is_adapted(layer: nn.Module) -> bool:
    return bool(getattr(type(layer), "adapter_layer_names", ())) and hasattr(layer, "active_adapters")


def _active(layer: Any) -> list[str]:
    off = layer.disable_adapters or getattr(layer, "merged", False)
    return [] if off else list(layer.active_adapters)


def _containers(layer: Any) -> Iterator[nn.ModuleDict]:
    for name in layer.adapter_layer_names:
        container = getattr(layer, name, None)
        if isinstance(container, nn.ModuleDict):
            yield container
