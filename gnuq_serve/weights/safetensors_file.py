"""The safetensors files of a checkpoint, and how a large one is written with little memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FLOATING = {name: dtype for dtype, name in _NAMES.items()}  # safetensors' names of the dtypes of plain weights
_PIECE = 16 * 2**20  # elements that are converted at a time


def files_of(path: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a checkpoint, as transformers chooses them; none where it has no such files.

    Args:
        path: folder or hub name.
        revision: branch, tag or commit on the hub.

    Raises:
        OSError: no such folder or name.
    """

    def found(name: str) -> Path | None:
        file = cached_file(
            path,
            name,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if file is None else Path(file)

    if (whole := found(SAFE_WEIGHTS_NAME)) is not None:
        return [whole]
    if (index := found(SAFE_WEIGHTS_INDEX_NAME)) is None:
        return []
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files = [found(shard) for shard in shards]
    return [file for file in files if file is not None] if None not in files else []


def mapped(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """Every tensor by its name, in memory that is mapped from the file: read when it is used.

    Raises:
        SafetensorError: a damaged file.
    """
    tensors: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for file in files:
            opened: Any = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def nbytes(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> int:
    """Size of the tensors in another dtype, in bytes."""
    return sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize


def write(
    file: Path,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Write the tensors in another dtype, piece by piece, to the disk itself.

    The layout is safetensors': the header's length (8 bytes, little-endian), the header in JSON, the data.

    Args:
        file: to write.
        tensors: by name; floating-point.
        dtype: of the file, one of ``FLOATING``.
        progress: told of the bytes of each piece.

    Raises:
        OSError: no room, say.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for piece in _pieces(tensors.values(), dtype):
            out.write(piece.view(torch.uint8).numpy().data)
            progress(piece.nbytes)
        out.flush()
        os.fsync(out.fileno())


def _pieces(tensors: Iterable[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        flat = tensor.flatten()
        for start in range(0, flat.numel(), _PIECE):
            yield flat[start : start + _PIECE].to(dtype)
