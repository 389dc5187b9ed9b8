"""What one layer was given, as its rule sees it; layers that read one tensor share what is computed from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gnuq_serve.gradnorm.gram import Gram


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Sums run in float32 at least, whatever the model's dtype (bfloat16 sums cost 0.4 % of the norm)."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def as_rows(tensor: Tensor) -> Tensor:
    """(B, T, d) in the accumulation dtype; dimensions between the first and the last are one."""
    return tensor.flatten(1, -2).to(accumulation_dtype(tensor))


class SharedInput:
    """One input tensor, kept once for all layers that read it (q, k and v read one tensor)."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.readers = 0
        self._version = tensor._version
        self._gram: Gram | None = None

    def gram(self) -> Gram:
        """``a a^T`` for each sample."""
        if self._gram is None:
            self._gram = Gram(as_rows(self.tensor))
        return self._gram

    @property
    def changed(self) -> bool:
        """Someone wrote into the tensor since."""
        return self.tensor._version != self._version


class LayerCall:
    """One call of one layer.

    Attributes:
        tensor: its first tensor argument, detached: (B, T, ..., d) activations or (B, T) ids. Layers that
            are given the rows of all samples in one, (B * T, d), are shown (B, T, d).
        args, kwargs: everything it was called with, tensors detached; for rules with ``keep_arguments``.
        output: what it returned, detached; for rules with ``keep_output``.
    """

    def __init__(
        self,
        shared: SharedInput,
        shape: tuple[int, int] | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        output: Tensor | None = None,
    ) -> None:
        self._shared = shared
        shared.readers += 1
        self._rows_of = shape
        self.args = tuple(_detached(value) for value in args)
        self.kwargs = {name: _detached(value) for name, value in (kwargs or {}).items()}
        self.output = output

    @classmethod
    def of(cls, tensor: Tensor) -> LayerCall:
        """A call known by its input alone."""
        return cls(SharedInput(tensor))

    @property
    def tensor(self) -> Tensor:
        """See above."""
        return self.by_sample(self._shared.tensor)

    @property
    def readers(self) -> int:
        """How many layers took this very tensor."""
        return self._shared.readers

    def gram(self) -> Gram:
        """``a a^T`` for each sample, computed once for all readers."""
        return self._shared.gram() if self._rows_of is None else Gram(as_rows(self.tensor))

    def by_sample(self, tensor: Tensor) -> Tensor:
        """A tensor of this call with one leading dimension for the samples: (B * T, ...) becomes (B, T, ...)."""
        return tensor if self._rows_of is None else tensor.unflatten(0, self._rows_of)

    def check_unchanged(self, name: str) -> None:
        """The rules need the input as the layer saw it.

        Raises:
            RuntimeError: the model wrote into the tensor after the layer had read it.
        """
        if self._shared.changed:
            raise RuntimeError(f"the input of {name} was changed in place after use; its gradient norm is lost")


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
