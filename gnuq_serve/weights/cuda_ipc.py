"""An engine's memory on a GPU, opened by another process: CUDA IPC, by torch's own means, as plain values.

What keeps what alive: a handle names memory and does not hold it. The engine's process holds its storages for as
long as handles of them are about; here that is until it ends, with everything that could be asked. In the other
process the mapping lasts as long as a tensor on it. It is freed by nobody: the memory stays the engine's.

Unlike a file, such memory can't be mapped for reading only: who opens it must not write to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from gnuq_serve.errors import first_line
from gnuq_serve.weights.source import SourceRefused


class CudaStorage(msgspec.Struct, frozen=True):
    """A storage, for another process to open; what ``torch.UntypedStorage._new_shared_cuda`` takes.

    Attributes:
        handle: of the allocation that the storage is a part of.
        size: in bytes.
        offset: in the allocation, in bytes.
        counter: name of the shared memory where torch counts who has it open.
        counter_offset: of the count.
    """

    handle: bytes
    size: int
    offset: int
    counter: bytes
    counter_offset: int


class CudaStorages(msgspec.Struct, frozen=True):
    """Storages on one GPU.

    Attributes:
        gpu: its UUID; what ``cuda:0`` is differs from process to process.
        storages: in the order in which they were given.
    """

    gpu: str
    storages: tuple[CudaStorage, ...]


def exported(storages: Sequence[torch.UntypedStorage]) -> CudaStorages:
    """Handles of storages, once all that was to be written to them is written. The caller keeps the storages.

    Raises:
        SourceRefused: they are not all on one GPU, or it can't share their memory.
    """
    devices = {storage.device for storage in storages}
    device = devices.pop()
    if devices or device.type != "cuda":
        raise SourceRefused("the engine's weights are not all in the memory of one CUDA device")
    torch.cuda.synchronize(device)
    try:
        return CudaStorages(_uuid(device.index), tuple(map(_exported, storages)))
    except RuntimeError as error:
        raise SourceRefused(f"the GPU can't share the engine's weights: {first_line(error)}{_REMEDY}") from error


def opened(shared: CudaStorages) -> list[torch.UntypedStorage]:
    """The same memory in this process, which makes that GPU its current one. Another process has exported it.

    Raises:
        SourceRefused: this process does not see that GPU, or can't open its memory.
    """
    indices = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    index = next((index for index in indices if _uuid(index) == shared.gpu), None)
    if index is None:
        raise SourceRefused(
            f"the engine's weights are on the GPU {shared.gpu}, which the scorer does not see: it sees "
            f"{len(indices)} (CUDA_VISIBLE_DEVICES)"
        )
    torch.cuda.set_device(index)
    try:
        return [_opened(index, storage) for storage in shared.storages]
    except RuntimeError as error:
        raise SourceRefused(f"the engine's weights can't be opened: {first_line(error)}{_REMEDY}") from error


# torch hands such memory over by other means, for which a process must be allowed to trace the other.
_REMEDY = ". Where PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF has expandable_segments, leave that out"


def _exported(storage: torch.UntypedStorage) -> CudaStorage:
    # The last two are an event that says when the memory is written: it is.
    _, handle, size, offset, counter, counter_offset, _, _ = storage._share_cuda_()
    return CudaStorage(handle, size, offset, counter, counter_offset)


def _opened(index: int, storage: CudaStorage) -> torch.UntypedStorage:
    return torch.UntypedStorage._new_shared_cuda(
        index, storage.handle, storage.size, storage.offset, storage.counter, storage.counter_offset, b"", False
    )


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
