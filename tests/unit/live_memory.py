"""Bytes of tensors alive at a time, counted storage by storage as torch makes and frees them."""

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Counts inside the ``with``, the model's own tensors left out; ``peak`` is the largest count.

    Past ``limit`` bytes there is no memory for another tensor.
    """

    def __init__(self, model: nn.Module, limit: float = math.inf) -> None:
        super().__init__()
        self.limit = limit
        self.refused = 0
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            if self.now + size > self.limit:
                self.refused += 1
                raise torch.OutOfMemoryError(f"out of memory. Tried to allocate {size} bytes")
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
