"""A model from a Hugging Face checkpoint: a folder, or a name on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gnuq_serve.errors import first_line


class CheckpointError(ValueError):
    """The checkpoint can't be used for scoring; the message names the argument and the remedy."""


def load_checkpoint(
    path: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    config_overrides: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load a causal language model for scoring.

    Args:
        path: folder or hub name.
        dtype: ``"auto"`` (the checkpoint's own), a name (``"float32"``) or a torch dtype.
        device: ``"auto"`` (a GPU if there is one), a name (``"cuda:1"``) or a torch device.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the checkpoint.
        config_overrides: entries of the model's configuration to replace.

    Raises:
        CheckpointError: nothing at that path, tensors missing in it, a quantised checkpoint, or a dtype or
            device that does not exist.
    """
    torch_dtype = parse_dtype(dtype)
    torch_device = parse_device(device)
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **source, **dict(config_overrides or {}))
    except (OSError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(
            f"model={path!r} can't be loaded: no usable config.json there ({first_line(error)})"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"model={path!r} is quantised; its gradient needs plain weights: name an unquantised checkpoint"
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch_dtype or "auto", output_loading_info=True, **source
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # a damaged file; other shapes
        raise CheckpointError(f"model={path!r} can't be loaded: {first_line(error)}") from error
    # transformers fills absent tensors with random numbers and only logs it.
    if report["missing_keys"] or report["mismatched_keys"]:
        absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise CheckpointError(
            f"model={path!r} lacks tensors that its config.json asks for: {', '.join(absent[:3])}"
        )
    loaded: nn.Module = model.to(torch_device).eval().requires_grad_(False)
    return loaded


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
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"device={str(device)!r} can't be used here ({first_line(error)}); use auto or cpu"
        ) from error


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
