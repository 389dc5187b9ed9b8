"""A few values of a tensor, to see without reading all of it whether it is another one."""

from __future__ import annotations

import torch

_COUNT = 64


def some_values(tensor: torch.Tensor) -> torch.Tensor:
    """64 to 127 values, evenly spread over the tensor in row-major order; all of a smaller one.

    Only these are read: the tensor may lie anywhere, in any strides.
    """
    count = tensor.numel()
    if count == 0:
        return tensor.detach().flatten()
    flat = torch.arange(0, count, max(1, count // _COUNT))
    index = torch.unravel_index(flat.to(tensor.device), tensor.shape) if tensor.ndim else ()
    return tensor.detach()[index].flatten()
