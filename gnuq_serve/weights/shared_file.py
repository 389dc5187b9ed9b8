"""Weights in memory that another process may map, and a number that tells when they change.

The memory is an anonymous file: no disk, no limit of ``/dev/shm``, gone with its last process. Its first page
holds the version, its rest the weights, unless they are on a GPU. The engine maps it for writing; then it is
sealed, so that nobody else can, and the scorer maps it privately: what the scorer would write stays with the
scorer.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from typing import Any

import torch

from gnuq_serve.weights.source import SourceRefused

_PAGE = mmap.PAGESIZE
_VERSION = struct.Struct("<q")
_SEAL_FUTURE_WRITE = 0x0010  # F_SEAL_FUTURE_WRITE, which Python does not name yet


class SharedFile:
    """The engine's side: storages in one file, and their version.

    The version is even while the weights stay as they are, and odd while they change.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        """Make it; nothing is in it yet.

        Args:
            sizes: of each storage, in bytes; none: it is for the version alone.

        Raises:
            OSError: no memory for it, or a system without such files.
        """
        self.starts = []
        end = _PAGE
        for size in sizes:
            self.starts.append(end)
            end += -(-size // _PAGE) * _PAGE
        self.size = end
        self._descriptor = os.memfd_create("gnuq-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._descriptor, self.size)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        self.storage = _mapped(self.path, self.size, shared=True)
        self._header = mmap.mmap(self._descriptor, _PAGE)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _SEAL_FUTURE_WRITE
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, seals)

    @property
    def version(self) -> int:
        """As readers see it."""
        return int(_VERSION.unpack_from(self._header)[0])

    def begin_change(self) -> None:
        """Say that the weights are about to change; nothing happens if that has been said."""
        if self.version % 2 == 0:
            _VERSION.pack_into(self._header, 0, self.version + 1)

    def end_change(self) -> None:
        """Say that they are whole again."""
        if self.version % 2:
            _VERSION.pack_into(self._header, 0, self.version + 1)


class MappedFile:
    """The scorer's side of a ``SharedFile``."""

    def __init__(self, path: str, size: int = _PAGE) -> None:
        """Map it.

        Args:
            path: as the engine gives it.
            size: of the file, in bytes; by default that of one with the version alone.

        Raises:
            SourceRefused: it can't be opened from here.
        """
        try:
            with open(path, "rb") as file:  # noqa: PTH123  (a descriptor is asked of it)
                self._header = mmap.mmap(file.fileno(), _PAGE, access=mmap.ACCESS_READ)
                # Not shared: pages are the engine's until somebody here writes to them.
                self.storage = _mapped(f"/proc/self/fd/{file.fileno()}", size, shared=False)
        except (OSError, RuntimeError) as error:
            raise SourceRefused(f"the engine's weights ({path}) can't be mapped: {error}") from error

    @property
    def version(self) -> int | None:
        """None while the weights are being changed."""
        version = int(_VERSION.unpack_from(self._header)[0])
        return None if version % 2 else version


def _mapped(path: str, size: int, *, shared: bool) -> torch.UntypedStorage:
    storage: Any = torch.UntypedStorage.from_file(path, shared, size)
    return storage  # type: ignore[no-any-return]
