"""Hooks that are taken off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def removing(handle: RemovableHandle) -> Iterator[None]:
    """Remove the hook on leaving."""
    try:
        yield
    finally:
        handle.remove()
