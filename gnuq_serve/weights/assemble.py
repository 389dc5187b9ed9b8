"""A Hugging Face model around tensors that are there already: built empty, each parameter a given tensor."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from gnuq_serve.weights.empty import empty_model
from gnuq_serve.weights.source import SourceRefused


def assemble(
    config: Any,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    untraced: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model of a configuration, on given tensors; none is copied, and none is written to.

    Args:
        config: of the model, as ``load_config`` gives it.
        tensors: by their names in the checkpoint.
        dtype: of the model, as for ``load_checkpoint``.
        untraced: why other tensors of the checkpoint are not among them.
        trust_remote_code: run code that comes with the checkpoint.

    Returns:
        The model in eval mode, without gradients.

    Raises:
        SourceRefused: a parameter or buffer of it is not given, or not like this model's.
    """
    model = empty_model(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    _compute_buffers(model, device)
    given, missing = _by_own_names(model, tensors, untraced or {})
    for names in _tied(model):
        name = next((name for name in names if name in given), names[0])
        parameter = nn.Parameter(_found(name, given, missing, model.get_parameter(name)), requires_grad=False)
        for name in names:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_parameter(leaf, parameter)
    persistent = model.state_dict()
    for name, buffer in list(model.named_buffers()):
        if name in persistent:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, _found(name, given, missing, buffer))
    built: nn.Module = model.eval().requires_grad_(False)
    return built


def merged(model: Any) -> str | None:
    """A parameter that transformers' loader makes of several tensors of a checkpoint; None where it makes none.

    Such a model can't be assembled of an engine's tensors.

    Args:
        model: as transformers builds it; it may be empty.
    """
    mapping = get_model_conversion_mapping(model)
    converters = []
    for entry in mapping:
        if isinstance(entry, WeightConverter):
            with suppress(NotImplementedError):  # one that can't be turned round, which is found out later then
                converters.append(entry.reverse_transform())
    for name in model.state_dict():
        if any(converter.rename_source_key(name)[1] is not None for converter in converters):
            return str(name)
    return None


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of each parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _found(
    name: str, given: Mapping[str, torch.Tensor], missing: Mapping[str, str], expected: torch.Tensor
) -> torch.Tensor:
    """The tensor for a parameter or buffer.

    Raises:
        SourceRefused: there is none, or one of another shape or dtype.
    """
    if name not in given:
        raise SourceRefused(f"{name}: {missing.get(name, 'the engine loaded no such tensor')}")
    found = given[name]
    for property_ in ("shape", "dtype"):
        here, there = getattr(found, property_), getattr(expected, property_)
        if here != there:
            raise SourceRefused(
                f"{name}: its {property_} is {here} in the engine, {there} in transformers' model"
            )
    return found


def _by_own_names(
    model: Any, tensors: Mapping[str, torch.Tensor], untraced: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """With the names that transformers' loader would give each checkpoint tensor in this model.

    Returns:
        The tensors, and why others are not among them: what that loader merges or splits is no tensor of a
        checkpoint.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    own = model.state_dict()
    given: dict[str, torch.Tensor] = {}
    missing: dict[str, str] = {}
    for name in (*untraced, *tensors):
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if name in untraced:
            missing.setdefault(renamed, untraced[name])
        elif converted is not None:
            missing.setdefault(renamed, "transformers makes it of several tensors of the checkpoint")
        else:
            given[renamed] = tensors[name]
    return given, missing


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Give every buffer its value: what no checkpoint holds, transformers computes from the configuration.

    That is done on the CPU, as where a checkpoint is loaded. Parameters are on the meta device still, where
    initialising them writes nothing.

    Raises:
        SourceRefused: one that no checkpoint holds is not computed by its model's initialisation.
    """
    persistent = model.state_dict()
    results = []
    for filling in (0, 1):
        for name, buffer in list(model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            module._buffers[leaf] = torch.full_like(buffer, filling, device="cpu")
        for module in model.modules():
            module._is_hf_initialized = False
        model.initialize_weights()
        results.append({name: buffer.clone() for name, buffer in model.named_buffers() if name not in persistent})
    first, second = results
    unset = [name for name in first if not torch.equal(first[name], second[name])]
    if unset:
        raise SourceRefused(f"{unset[0]} is a buffer whose value transformers does not compute anew")
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
