"""Inner products of Gram matrices: ``<a a^T, b b^T> = ||b^T a||^2`` without ``b^T a``.

Gram matrices are symmetric: only the lower half is formed, in strips of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Narrow strips leave little above the diagonal, but small products are slow on a GPU.
CPU_STRIP = 32
GPU_STRIP = 512


class Gram:
    """``a a^T`` for each sample, from ``a`` (B, T, d)."""

    def __init__(self, rows: Tensor) -> None:
        self._strips = []
        for strip in _lower_half(rows):
            size = strip.shape[1]
            # What stands left of the square on the diagonal counts for its mirror image too.
            self._strips.append(torch.cat([2 * strip[..., :-size], strip[..., -size:]], -1))

    def inner(self, rows: Tensor) -> Tensor:
        """``||b^T a||^2`` for each sample, (B,), from ``b`` (B, T, d')."""
        products = [
            (mine * strip).sum((1, 2)) for mine, strip in zip(self._strips, _lower_half(rows), strict=True)
        ]
        return torch.stack(products).sum(0)


def work(length: int) -> float:
    """The share of the ``length x length`` products that ``Gram`` forms on a CPU."""
    return min(1.0, (1 + CPU_STRIP / length) / 2)


def _lower_half(rows: Tensor) -> Iterator[Tensor]:
    size = CPU_STRIP if rows.device.type == "cpu" else GPU_STRIP
    for start in range(0, rows.shape[1], size):
        stop = start + size
        yield rows[:, start:stop] @ rows[:, :stop].mT
