"""Turning copies round: from "this part of the tensor was copied there" to "the tensor is this view"."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass


class NotAViewError(ValueError):
    """The copies put the tensor in no regular place; the message says what they did."""


@dataclass(frozen=True, slots=True)
class Copied:
    """One copy: element ``i``, a multi-index below ``shape``, from ``offset + i·stride`` to ``to + i·to_stride``.

    Attributes:
        offset: from the source tensor's first element, in elements.
        stride: in the source tensor's memory.
        to: from the destination storage's beginning, in elements.
        to_stride: in the destination's memory.
        shape: of the part copied.
    """

    offset: int
    stride: tuple[int, ...]
    to: int
    to_stride: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Box:
    """The same in the source tensor's own dimensions: a box of it, and the stride of each of its sides."""

    start: tuple[int, ...]
    lengths: tuple[int, ...]
    to: int
    strides: tuple[int | None, ...]  # None: the side has one element


def view_of(shape: Sequence[int], copies: Sequence[Copied]) -> tuple[int, tuple[int, ...]]:
    """The whole source tensor as a view of where its parts were copied to.

    Args:
        shape: of the source tensor, which lies row by row in its memory.
        copies: all that were made of it, into one storage.

    Returns:
        Offset and strides in that storage, in elements.

    Raises:
        NotAViewError: the parts lie in no common regular place, or are not the whole tensor.
    """
    boxes = {_box(shape, copied) for copied in copies}
    if sum(math.prod(box.lengths) for box in boxes) != math.prod(shape):
        raise NotAViewError("the engine holds only a part of it, or a part twice")
    strides: list[int] = []
    for side, length in enumerate(shape):
        known = {stride for box in boxes if (stride := box.strides[side]) is not None}
        if len(known) > 1 or (not known and length > 1):
            raise NotAViewError("the engine put its parts in no common order")
        strides.append(known.pop() if known else 0)
    places = {box.to - sum(map(operator.mul, box.start, strides)) for box in boxes}
    if len(places) != 1:
        raise NotAViewError("the engine put its parts in no common place")
    # What torch gives a side of one element: as if the next side went on.
    for side in reversed(range(len(shape))):
        if shape[side] == 1:
            inner = side + 1
            strides[side] = strides[inner] * shape[inner] if inner < len(shape) else 1
    return places.pop(), tuple(strides)


def _box(shape: Sequence[int], copied: Copied) -> _Box:
    """A copy in the source tensor's own dimensions.

    Raises:
        NotAViewError: it repeats elements, or cuts the tensor across its dimensions.
    """
    rows = [math.prod(shape[side + 1 :]) for side in range(len(shape))]
    start = tuple(copied.offset // row % length for row, length in zip(rows, shape, strict=True))
    lengths = [1] * len(shape)
    strides: list[int | None] = [None] * len(shape)
    for stride, to_stride, count in _joined(copied):
        if stride == 0:
            raise NotAViewError("the engine repeated it")
        for side, row in reversed(list(enumerate(rows))):
            if count == 1 or shape[side] == 1 or row < stride:
                continue
            if row > stride:
                raise NotAViewError("the engine rearranged it")
            taken = min(count, shape[side])
            if lengths[side] > 1 or count % taken or start[side] + taken > shape[side]:
                raise NotAViewError("the engine rearranged it")
            lengths[side], strides[side] = taken, to_stride
            # The rest of a flattened dimension goes on in the next one.
            stride, to_stride, count = stride * taken, to_stride * taken, count // taken
        if count > 1:
            raise NotAViewError("the engine rearranged it")
    return _Box(start, tuple(lengths), copied.to, tuple(strides))


def _joined(copied: Copied) -> list[tuple[int, int, int]]:
    """(source stride, destination stride, count) of each dimension, inner ones first, those that go on joined."""
    sides = sorted(
        (stride, to_stride, count)
        for stride, to_stride, count in zip(copied.stride, copied.to_stride, copied.shape, strict=True)
        if count > 1
    )
    joined: list[tuple[int, int, int]] = []
    for stride, to_stride, count in sides:
        if joined:
            inner, to_inner, inner_count = joined[-1]
            if stride == inner * inner_count and to_stride == to_inner * inner_count:
                joined[-1] = (inner, to_inner, inner_count * count)
                continue
        joined.append((stride, to_stride, count))
    return joined
