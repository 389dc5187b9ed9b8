"""How much memory scoring needs: weights of its own, and one pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn


def weight_bytes(model: nn.Module) -> int:
    """Size of all parameters, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def own_bytes(model: nn.Module, *, gpu_is_own: bool = True) -> int:
    """How much of it is memory of this process: what is mapped from a file is the file's, not ours.

    Args:
        model: any.
        gpu_is_own: whether weights on a GPU are; another process may have shared them.
    """
    mapped = list(_mapped_ranges())
    own = 0
    for parameter in model.parameters():
        at = parameter.data_ptr()
        if parameter.device.type == "cpu":
            is_own = not any(start <= at < end for start, end in mapped)
        else:
            is_own = gpu_is_own
        own += parameter.nbytes if is_own else 0
    return own


def _mapped_ranges() -> Iterator[tuple[int, int]]:
    """Addresses at which files are mapped; none where the system does not tell."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            start, end = addresses.split("-")
            yield int(start, 16), int(end, 16)
