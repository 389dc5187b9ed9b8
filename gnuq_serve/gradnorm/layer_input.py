"""What a layer was given, shared by all layers that were given the same tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Sums run in float32 at least, whatever the model's dtype (bfloat16 sums cost 0.4 % of the norm)."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class LayerInput:
    """One input tensor and the number of layers that read it (q, k and v read one tensor).

    Attributes:
        tensor: (B, T, d) activations or (B, T) ids, detached.
        readers: how many layers took this very tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.readers = 0
        self._version = tensor._version
        self._gram: Tensor | None = None

    def gram(self) -> Tensor:
        """``a a^T`` for each sample, (B, T, T), computed once for all readers."""
        if self._gram is None:
            rows = as_rows(self.tensor)
            self._gram = rows @ rows.mT
        return self._gram

    def check_unchanged(self, name: str) -> None:
        """The rules need the input as the layer saw it.

        Raises:
            RuntimeError: the model wrote into the tensor after the layer had read it.
        """
        if self.tensor._version != self._version:
            raise RuntimeError(f"the input of {name} was changed in place after use; its gradient norm is lost")


def as_rows(tensor: Tensor) -> Tensor:
    """(B, T, d) in the accumulation dtype; dimensions between the first and the last are one."""
    return tensor.flatten(1, -2).to(accumulation_dtype(tensor))
