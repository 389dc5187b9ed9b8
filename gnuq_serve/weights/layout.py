"""Where each tensor of a checkpoint lies in storages that somebody else fills: in JSON, for another process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from gnuq_serve.weights.cuda_ipc import CudaStorages

if TYPE_CHECKING:
    import torch


class TensorView(msgspec.Struct, frozen=True):
    """A tensor as strides over a storage.

    Attributes:
        storage: which one, by its place in ``Layout.storages``.
        offset: of the first element, in elements.
        shape: the tensor's, as in the checkpoint.
        stride: of each dimension, in elements.
        dtype: torch's name of it (``"float32"``).
    """

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    def of(self, storages: Sequence[torch.UntypedStorage]) -> torch.Tensor:
        """The tensor itself; nothing is copied."""
        import torch

        storage = storages[self.storage]
        dtype: torch.dtype = getattr(torch, self.dtype)
        empty = torch.empty(0, dtype=dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)


class Layout(msgspec.Struct, frozen=True):
    """All tensors of a loaded checkpoint.

    Attributes:
        tensors: by their names in the checkpoint.
        untraced: why there is no view of a tensor, by the same names.
        storages: the size of each storage, in bytes.
    """

    tensors: dict[str, TensorView]
    untraced: dict[str, str]
    storages: tuple[int, ...]

    def on(self, storages: Sequence[torch.UntypedStorage]) -> Mapping[str, torch.Tensor]:
        """Every tensor, as a view of the storages."""
        return {name: view.of(storages) for name, view in self.tensors.items()}


class SharedWeights(msgspec.Struct, frozen=True):
    """What an engine says of the weights that it shares; goes to the scorer process.

    Attributes:
        path: of the file that holds their version, while the engine lives.
        layout: the tensors in their storages.
        gpu: the storages, on a GPU; None: the file is the only one.
        probe_ids: token ids that the engine has read.
        probe_log_probability: their log-probability by the engine, all but the first; None before it is known.
        version: of the weights that the engine read them with.
    """

    path: str
    layout: Layout
    gpu: CudaStorages | None = None
    probe_ids: tuple[int, ...] = ()
    probe_log_probability: float | None = None
    version: int = 0
