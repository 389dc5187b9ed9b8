"""A model from a Hugging Face checkpoint: a folder, or a name on the hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gnuq_serve.errors import first_line
from gnuq_serve.weights.converted import NotConvertedError, converted_tensors
from gnuq_serve.weights.empty import empty_model

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """The checkpoint can't be used for scoring; the message names the argument and the remedy."""


def load_checkpoint(
    path: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    config_overrides: Mapping[str, Any] | None = None,
    map_converted: bool = False,
) -> nn.Module:
    """Load a causal language model for scoring.

    On a CPU, weights that the checkpoint holds in the wanted dtype are mapped from its files, not read: they take
    no memory of the process's own. Others are cast, which makes a copy, unless ``map_converted`` is set.

    Args:
        path: folder or hub name.
        dtype: ``"auto"`` (the checkpoint's own), a name (``"float32"``) or a torch dtype.
        device: ``"auto"`` (a GPU if there is one), a name (``"cuda:1"``) or a torch device.
        device_map: instead of ``device``, which module goes where, as transformers takes it (``"balanced"``:
            split over all GPUs); every parameter must stay in memory.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the checkpoint.
        config_overrides: entries of the model's configuration to replace.
        map_converted: on a CPU, where the dtype is another than the checkpoint's, map a converted file from the
            cache, made when it is first asked for (``weights.converted``); where that can't be, the log says why.

    Raises:
        CheckpointError: nothing at that path, tensors missing in it, a quantised checkpoint, an override that the
            configuration does not know, or a dtype or device that does not exist.
    """
    torch_dtype = parse_dtype(dtype)
    if device_map is not None and device != "auto":
        raise CheckpointError(f"device={str(device)!r} and device_map={device_map!r} were given: choose one")
    torch_device = parse_device(device)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(path, config_overrides=config_overrides, **source)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"model={path!r} is quantised; its gradient needs plain weights: name an unquantised checkpoint "
            "(of a server: --gnuq-scorer-model)"
        )
    split = {} if device_map is None else {"device_map": device_map}
    wanted = torch_dtype or config.dtype
    mapped: Any = None
    if map_converted and wanted is not None and not split and torch_device.type == "cpu":
        mapped = _mapped(path, config, wanted, **source)
    try:
        if mapped is not None:
            model_class, tensors = mapped
            model, report = model_class.from_pretrained(
                None, config=config, state_dict=tensors, dtype=wanted, output_loading_info=True
            )
        else:
            model, report = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=torch_dtype or "auto", output_loading_info=True, **split, **source
            )
    # A damaged file; other shapes; a device map that does not fit, or accelerate missing.
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise CheckpointError(f"model={path!r} can't be loaded: {first_line(error)}") from error
    # transformers fills absent tensors with random numbers and only logs it.
    if report["missing_keys"] or report["mismatched_keys"]:
        absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise CheckpointError(
            f"model={path!r} lacks tensors that its config.json asks for: {', '.join(absent[:3])}"
        )
    loaded: nn.Module = model if split else model.to(torch_device)
    check_in_memory(loaded)
    return loaded.eval().requires_grad_(False)


def _mapped(
    path: str, config: Any, dtype: torch.dtype, *, revision: str | None, trust_remote_code: bool
) -> tuple[Any, dict[str, torch.Tensor]] | None:
    """The model's class and all its tensors, mapped from a converted file; None: it is to be loaded as usual."""
    try:
        empty = empty_model(config, dtype=dtype, trust_remote_code=trust_remote_code)
        # transformers leaves some tensors of some models in float32: cast and cast back, these would be others.
        if empty._get_dtype_plan(dtype) or any(p.dtype != dtype for p in empty.parameters()):
            raise NotConvertedError(f"some tensors of this model are not to be {dtype}")
        tensors = converted_tensors(path, dtype, revision=revision)
    except Exception as error:  # a copy always works
        logger.warning("the scorer's weights are a copy in its own memory, in %s: %s", dtype, first_line(error))
        return None
    return None if tensors is None else (type(empty), tensors)


def load_config(
    path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    config_overrides: Mapping[str, Any] | None = None,
) -> Any:
    """The configuration of a checkpoint, some entries replaced.

    Raises:
        CheckpointError: none at that path, or an override that it does not know.
    """
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    overrides = dict(config_overrides or {})
    unknown = set(overrides) & set(source)
    try:
        if not unknown:
            # transformers silently drops what it does not know.
            config, unknown = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **source, **overrides)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(
            f"model={path!r} can't be loaded: no usable config.json there ({first_line(error)})"
        ) from error
    if unknown:
        raise CheckpointError(
            f"config_overrides has entries that the configuration of model={path!r} does not know: "
            f"{', '.join(sorted(unknown))}; the names are those in its config.json"
        )
    return config


def check_in_memory(model: nn.Module) -> None:
    """Rules read the weights themselves: each one must be where the layer computes.

    Raises:
        CheckpointError: a parameter has been offloaded to another place, or never got values.
    """
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise CheckpointError(
            f"{len(absent)} of the model's parameters are not in memory ({absent[0]}: offloaded, or on the meta "
            "device): place all of them on GPUs or on the CPU, by another device_map or a smaller dtype"
        )


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The torch dtype meant; None for ``"auto"``.

    Raises:
        CheckpointError: not a floating-point dtype.
    """
    if dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ):
        raise CheckpointError(f"dtype={dtype!r} is unknown; use auto, float16, bfloat16, float32 or float64")
    return found


def parse_device(device: str | torch.device) -> torch.device:
    """The torch device meant; ``"auto"`` is a GPU if there is one.

    Raises:
        CheckpointError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"device={str(device)!r} can't be used here ({first_line(error)}); use auto or cpu"
        ) from error
    if found.type == "meta":
        raise CheckpointError("device='meta' can't be used here (it has no numbers); use auto or cpu")
    return found


def check_same_vocabulary(scored: str, served: str, *, trust_remote_code: bool = False) -> None:
    """Token ids of one model mean nothing to another unless the two have one vocabulary.

    Raises:
        CheckpointError: the tokenizers of the two checkpoints differ, or one can't be read.
    """
    vocabularies = []
    for path in (scored, served):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the tokenizer of {path!r} can't be loaded: {first_line(error)}") from error
        vocabularies.append(tokenizer.get_vocab())
    if vocabularies[0] != vocabularies[1]:
        raise CheckpointError(
            f"the scorer's model {scored!r} ({len(vocabularies[0])} tokens) and the served model {served!r} "
            f"({len(vocabularies[1])} tokens) have different vocabularies: score with the served model's weights"
        )
