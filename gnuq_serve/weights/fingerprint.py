"""A short name for "these weights, scored this way": numbers under two names must not be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from operator import itemgetter
from typing import Any

import torch
from torch import nn

SCORING_VERSION = 1  # raised only when the numbers change

# Entries of a configuration that say where a model came from or how to generate with it, not what it computes.
_NO_INFLUENCE = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")


def fingerprint_of(model: nn.Module, mode: str) -> str:
    """12 hexadecimal digits from configuration and mode, and of each tensor name, shape, dtype and 64 values."""
    digest = hashlib.sha256(f"gnuq {SCORING_VERSION} {mode}".encode())
    config: Any = model.config
    settings = {name: value for name, value in config.to_dict().items() if name not in _NO_INFLUENCE}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    # A layer that had an adapter holds its own weights one name deeper.
    add_tensors(digest, ((name.replace(".base_layer.", "."), p) for name, p in model.named_parameters()))
    return digest.hexdigest()[:12]


def add_tensors(digest: hashlib._Hash, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Feed each tensor's name, shape, dtype and 64 of its values to a digest, in the order of their names."""
    for name, tensor in sorted(tensors, key=itemgetter(0)):
        flat = tensor.detach().flatten()
        picked = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(picked.numpy().tobytes())
