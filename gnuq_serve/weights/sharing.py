"""Putting an engine's weights where a scorer can map them: on a CPU they move, on a GPU they stay."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from gnuq_serve.weights.cuda_ipc import exported
from gnuq_serve.weights.layout import Layout, SharedWeights, TensorView
from gnuq_serve.weights.shared_file import SharedFile
from gnuq_serve.weights.source import SourceRefused


def made_shareable(
    model: nn.Module, layout: Layout, storages: list[torch.UntypedStorage]
) -> tuple[SharedFile, Layout, list[torch.UntypedStorage]]:
    """Have the storages of a model where another process can get at them, and a file that holds their version.

    Args:
        model: whose parameters and buffers lie in the storages.
        layout: of the checkpoint's tensors in them.
        storages: on a CPU they are moved into the file, and this list is emptied; others stay as they are.

    Returns:
        The file, the layout as it is now, and the storages that it speaks of.

    Raises:
        SourceRefused: there is no such file, or something else in the engine holds on to a storage.
    """
    if any(storage.device.type != "cpu" for storage in storages):
        return new_file(), layout, storages
    file, layout = share(model, layout, storages)
    return file, layout, [file.storage]


def share(model: nn.Module, layout: Layout, storages: list[torch.UntypedStorage]) -> tuple[SharedFile, Layout]:
    """Move the storages of a model into a shared file; its tensors are views of it afterwards.

    One storage is moved at a time, so that memory grows by the largest one only.

    Args:
        model: whose parameters and buffers lie in the storages.
        layout: of the checkpoint's tensors in them.
        storages: emptied, since each must be free after its move.

    Returns:
        The file, and the same layout with the file as its one storage.

    Raises:
        SourceRefused: there is no such file, or something else in the engine holds on to a storage.
    """
    file = new_file(layout.storages)
    for start in file.starts:
        _move(model, storages, file, start)
    return file, _in_one_file(layout, file.starts, file.size)


def new_file(sizes: Sequence[int] = ()) -> SharedFile:
    """A file for storages of these sizes, and for their version.

    Raises:
        SourceRefused: there can be none.
    """
    try:
        return SharedFile(sizes)
    except OSError as error:
        raise SourceRefused(f"no shared memory for the weights: {error}") from error


def shared_weights(file: SharedFile, layout: Layout, storages: Sequence[torch.UntypedStorage]) -> SharedWeights:
    """What a scorer is told of weights that lie in the file, or on a GPU.

    Raises:
        SourceRefused: they are somewhere else, or can't be shared.
    """
    in_file = [storage.data_ptr() for storage in storages] == [file.storage.data_ptr()]
    return SharedWeights(file.path, layout, None if in_file else exported(storages))


def _move(model: nn.Module, storages: list[torch.UntypedStorage], file: SharedFile, start: int) -> None:
    """Move the first one; afterwards nothing may refer to its old memory."""
    storage = storages.pop(0)
    size = storage.nbytes()
    here = torch.empty(0, dtype=torch.uint8).set_(file.storage, start, (size,))  # type: ignore[call-overload]
    here.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
    reference = StorageWeakRef(storage)
    del storage
    named = (*model.named_parameters(), *model.named_buffers())  # each once: a tied one is moved once
    held = [(name, tensor) for name, tensor in named if tensor.untyped_storage()._cdata == reference.cdata]
    for _, tensor in held:
        tensor.data = _view_of(tensor, file.storage, start)
    if (old := _still_there(reference)) is not None:
        # The engine would go on with the old memory, and never see a change of the new.
        for _, tensor in held:
            tensor.data = _view_of(tensor, old, -start)
        raise SourceRefused(f"something else in the engine holds the memory of {held[0][0]}")


def _still_there(reference: StorageWeakRef) -> torch.UntypedStorage | None:
    if reference.expired():
        return None
    gc.collect()
    old: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    return old


def _view_of(tensor: torch.Tensor, storage: torch.UntypedStorage, by: int) -> torch.Tensor:
    """The same view of another storage, which begins some bytes earlier."""
    offset = tensor.storage_offset() + by // tensor.element_size()
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(storage, offset, tensor.size(), tensor.stride())


def _in_one_file(layout: Layout, starts: Sequence[int], size: int) -> Layout:
    moved = {}
    for name, view in layout.tensors.items():
        dtype: torch.dtype = getattr(torch, view.dtype)
        offset = view.offset + starts[view.storage] // dtype.itemsize
        moved[name] = TensorView(0, offset, view.shape, view.stride, view.dtype)
    return Layout(moved, layout.untraced, (size,))
