"""A checkpoint in another dtype than the wanted one: converted once to a file of the cache, and mapped.

Casting while loading makes a private copy of all weights. A file in the right dtype is mapped instead: its pages
belong to the kernel's page cache, are shared by all who map them, and are given up when memory is short.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError

from gnuq_serve.cache import default_cache
from gnuq_serve.errors import first_line
from gnuq_serve.weights.safetensors_file import FLOATING, files_of, mapped, nbytes, write
from gnuq_serve.weights.samples import some_values

logger = logging.getLogger(__name__)

_SPARE = 64 * 2**20  # left free on the disk
_IN_MEMORY = {"tmpfs", "ramfs"}


class NotConvertedError(Exception):
    """There is no converted file, and none can be made; the message says why. Load a copy instead."""


def converted_tensors(
    path: str, dtype: torch.dtype, *, revision: str | None = None, cache: Path | None = None
) -> dict[str, torch.Tensor] | None:
    """Every tensor of a checkpoint in one floating-point dtype, mapped from files.

    What is in that dtype in the checkpoint comes from there, the rest from a file that is made when it is first
    asked for. That file is known by the checkpoint's place, sizes, times and headers and by the dtype, and is
    compared with the checkpoint at some values of each tensor each time. It may be deleted at any time: who has
    mapped it keeps it. One that a later state of the same checkpoint has replaced is deleted here.

    Args:
        path: folder or hub name.
        dtype: one of float16, bfloat16, float32, float64.
        revision: branch, tag or commit on the hub.
        cache: folder of the file; None: ``weights`` in the cache directory.

    Returns:
        The tensors by name; None where the checkpoint is in that dtype all through, and needs no such file.

    Raises:
        NotConvertedError: the checkpoint has no safetensors, or the cache no room, or no place on a disk.
    """
    try:
        files = files_of(path, revision)
        source = mapped(files)
    except (OSError, SafetensorError) as error:
        raise NotConvertedError(first_line(error)) from error
    if not source:
        raise NotConvertedError("the checkpoint has no safetensors files")
    plain = set(FLOATING.values())
    if any(tensor.is_floating_point() and tensor.dtype not in plain for tensor in source.values()):
        raise NotConvertedError("the checkpoint holds tensors of fewer than 16 bits")
    other = {name: t for name, t in source.items() if t.is_floating_point() and t.dtype != dtype}
    if not other:
        return None
    folder = cache or default_cache().expanduser().absolute() / "weights"
    file = _converted_file(folder, files, other, dtype)
    return source | file


def _converted_file(
    folder: Path, files: Sequence[Path], tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors from the file, which is made first where there is none that fits."""
    place, state = _identity(files)
    kind = f"{str(dtype).removeprefix('torch.')}-{place}"
    file = folder / f"{kind}-{state}.safetensors"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder / f"{kind}.lock"):
            found = _read(file, tensors)
            if found is None:
                for old in folder.glob(f"{kind}-*"):  # of another state of the checkpoint, or half made
                    old.unlink()
                _make(file, tensors, dtype)
                found = _read(file, tensors)
    except OSError as error:
        raise NotConvertedError(f"no converted file in {folder}: {first_line(error)}") from error
    if found is None:
        raise NotConvertedError(f"{file} is not what was written to it")
    return found


def _make(file: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    needed = nbytes(tensors, dtype)
    free = shutil.disk_usage(file.parent).free
    remedy = "name a folder on a disk in GNUQ_CACHE"
    if free < needed + _SPARE:
        raise NotConvertedError(
            f"{file.parent} has {free / 2**30:.2f} GiB free, and the converted weights take "
            f"{needed / 2**30:.2f} GiB: make room, or {remedy}"
        )
    if (kind := _filesystem(file.parent)) in _IN_MEMORY:
        raise NotConvertedError(f"{file.parent} is kept in memory ({kind}), where a file saves none: {remedy}")
    logger.info("converting %.2f GiB of weights to %s, once: %s", needed / 2**30, dtype, file)
    start = time.monotonic()
    part = file.with_suffix(".part")
    try:
        write(part, tensors, dtype)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    logger.info("converted after %.1f s", time.monotonic() - start)


def _read(file: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The tensors in the file; None where it isn't there, or isn't these tensors'."""
    try:
        found = mapped([file])
    except (FileNotFoundError, SafetensorError):
        return None
    fits = found.keys() == tensors.keys() and all(_same(found[name], tensors[name]) for name in tensors)
    return found if fits else None


def _same(found: torch.Tensor, source: torch.Tensor) -> bool:
    if found.shape != source.shape:
        return False
    expected = some_values(source).to(found.dtype)
    return torch.equal(some_values(found).nan_to_num(), expected.nan_to_num())


def _identity(files: Sequence[Path]) -> tuple[str, str]:
    """Names of a checkpoint's place, and of what it is now; 16 hexadecimal digits each."""
    place, state = hashlib.sha256(), hashlib.sha256()
    for file in files:
        about = file.stat()
        place.update(f"{file.absolute()}\n".encode())
        with file.open("rb") as opened:
            header = opened.read(int.from_bytes(opened.read(8), "little"))
        state.update(f"{about.st_size} {about.st_mtime_ns} ".encode() + header)
    return place.hexdigest()[:16], state.hexdigest()[:16]


def _filesystem(folder: Path) -> str:
    """The kind of file system that a folder is on; ``""`` where that isn't known."""
    at = folder.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if at.is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone among all processes that lock the file."""
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
