"""Which part of a model's memory holds which checkpoint tensor, learned by watching the model being loaded.

An engine stores weights its own way: q, k and v in one matrix, a padded vocabulary, another order of dimensions.
Whatever it does, loading is a sequence of ``destination.copy_(source)``, source being a view of a checkpoint
tensor. Recorded, and turned round, they give each checkpoint tensor as a view of the engine's memory, for every
architecture alike. What is not copied as it is (computed, repacked, split over workers) has no such view, and a
reason instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from gnuq_serve.weights.affine import Copied, NotAViewError, view_of
from gnuq_serve.weights.layout import Layout, TensorView
from gnuq_serve.weights.samples import some_values


@dataclass
class _Source:
    """A checkpoint tensor as the loader was given it."""

    name: str
    shape: tuple[int, ...]
    offset: int  # in its storage, in elements
    plain: bool  # row-major
    sample: torch.Tensor
    copies: list[tuple[StorageWeakRef, torch.dtype, Copied]] = field(default_factory=list)


class CopyRecorder(TorchDispatchMode):
    """Records the copies made while it is active; then tells where each tensor went.

    Hand every checkpoint tensor through ``watched`` on its way to the loader.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[str, _Source] = {}
        # A storage's number can't be reused while somebody holds a weak reference to it.
        self._storages: dict[int, tuple[StorageWeakRef, list[_Source]]] = {}
        self._names: dict[int, str] = {}

    def watched(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors, each noted as it passes."""
        for name, tensor in tensors:
            source = _Source(
                name,
                tuple(tensor.shape),
                int(tensor.storage_offset()),
                tensor.is_contiguous(),
                some_values(tensor).clone(),
            )
            self._sources[name] = source
            reference = StorageWeakRef(tensor.untyped_storage())
            self._storages.setdefault(reference.cdata, (reference, []))[1].append(source)
            yield name, tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation; note it if it copies from a checkpoint tensor."""
        if func is torch.ops.aten.copy_.default:
            self._note(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _note(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        _, candidates = self._storages.get(StorageWeakRef(source.untyped_storage()).cdata, (None, []))
        start = int(source.storage_offset())
        for candidate in candidates:
            if candidate.offset <= start < candidate.offset + max(1, math.prod(candidate.shape)):
                copied = Copied(
                    start - candidate.offset,
                    tuple(source.expand(destination.shape).stride()),
                    int(destination.storage_offset()),
                    tuple(destination.stride()),
                    tuple(destination.shape),
                )
                storage = StorageWeakRef(destination.untyped_storage())
                candidate.copies.append((storage, destination.dtype, copied))

    def loaded(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Note the engine's names of its memory, for reasons to name.

        Args:
            tensors: the engine's parameters and buffers as soon as they are loaded.
        """
        self._names = {tensor.untyped_storage()._cdata: name for name, tensor in tensors}

    def layout(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[Layout, list[torch.UntypedStorage]]:
        """Every checkpoint tensor as a view of the engine's memory.

        Args:
            tensors: the engine's parameters and buffers as they are now, when all processing is done.

        Returns:
            The layout, and the storages that it speaks of.
        """
        present = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for _, tensor in tensors}
        used: dict[int, int] = {}
        storages: list[torch.UntypedStorage] = []
        views: dict[str, TensorView] = {}
        untraced: dict[str, str] = {}
        for name, source in self._sources.items():
            try:
                cdata, dtype, (offset, stride) = self._traced(source, present)
            except NotAViewError as error:
                untraced[name] = str(error)
                continue
            if cdata not in used:
                used[cdata] = len(storages)
                storages.append(present[cdata])
            view = TensorView(used[cdata], offset, source.shape, stride, str(dtype).removeprefix("torch."))
            if not torch.equal(some_values(view.of(storages)).cpu(), source.sample.to(dtype).cpu()):
                untraced[name] = f"the engine changed {self._names.get(cdata, 'it')} after it was loaded"
                continue
            views[name] = view
        return Layout(views, untraced, tuple(storage.nbytes() for storage in storages)), storages

    def _traced(
        self, source: _Source, present: Mapping[int, torch.UntypedStorage]
    ) -> tuple[int, torch.dtype, tuple[int, tuple[int, ...]]]:
        if not source.copies:
            raise NotAViewError("the engine made no plain copy of it")
        if not source.plain:
            raise NotAViewError("the checkpoint does not hold it row by row")
        places = {(reference.cdata, dtype) for reference, dtype, _ in source.copies}
        gone = [cdata for cdata, _ in places if cdata not in present]
        if gone:
            raise NotAViewError(f"the engine repacked {self._names.get(gone[0], 'it')} after it was loaded")
        if len(places) > 1:
            raise NotAViewError("it is spread over several tensors of the engine")
        ((cdata, dtype),) = places
        return cdata, dtype, view_of(source.shape, [copied for *_, copied in source.copies])
