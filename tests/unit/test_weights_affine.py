"""Each case makes its copies for real; the view must then read the source tensor out of the destination."""

import pytest
import torch

from gnuq_serve.weights.affine import Copied, NotAViewError, view_of


class Bench:
    """A source tensor, a destination storage, and the copies made between them."""

    def __init__(self, *shape, room=400):
        self.source = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape)
        self.room = torch.zeros(room, dtype=torch.int64)
        self.copies = []

    def at(self, offset, shape, stride):
        return self.room.as_strided(shape, stride, offset)

    def copy(self, destination, source):
        destination.copy_(source)
        expanded = source.expand(destination.shape)
        self.copies.append(
            Copied(
                expanded.storage_offset(),
                expanded.stride(),
                destination.storage_offset(),
                destination.stride(),
                tuple(destination.shape),
            )
        )

    def check(self):
        offset, stride = view_of(tuple(self.source.shape), self.copies)
        assert torch.equal(self.at(offset, self.source.shape, stride), self.source)
        return offset, stride


def test_whole():
    bench = Bench(6, 5)
    bench.copy(bench.at(7, (6, 5), (5, 1)), bench.source)
    assert bench.check() == (7, (5, 1))


def test_scalar_and_vector():
    for shape in ((), (1,), (9,), (1, 1)):
        bench = Bench(*shape)
        bench.copy(bench.at(3, shape, bench.source.stride()), bench.source)
        assert bench.check()[0] == 3


def test_transposed_and_padded():
    bench = Bench(6, 5)
    bench.copy(bench.at(2, (5, 6), (8, 1)), bench.source.t())
    assert bench.check() == (2, (1, 8))


def test_in_parts_by_rows_columns_and_both():
    bench = Bench(6, 4)
    for rows in (slice(0, 3), slice(3, 6)):
        for columns in (slice(0, 2), slice(2, 4)):
            part = bench.source[rows, columns]
            bench.copy(bench.at(5 + rows.start * 10 + columns.start * 2, part.shape, (10, 2)), part)
    assert bench.check() == (5, (10, 2))


def test_flattened_and_reshaped():
    bench = Bench(4, 3, 5)
    bench.copy(bench.at(1, (60,), (1,)), bench.source.reshape(60))
    assert bench.check() == (1, (15, 5, 1))
    bench = Bench(4, 15)
    bench.copy(bench.at(1, (2, 2, 3, 5), (30, 15, 5, 1)), bench.source.view(2, 2, 3, 5))
    assert bench.check() == (1, (15, 1))


def test_a_part_of_three_dimensions_each():
    bench = Bench(3, 4, 5)
    for expert in range(3):
        bench.copy(bench.at(expert * 40, (4, 5), (1, 4)), bench.source[expert])
    with pytest.raises(NotAViewError, match="no common order"):  # no single copy says how far experts are apart
        bench.check()
    bench = Bench(3, 4, 5)
    bench.copy(bench.at(0, (2, 4, 5), (40, 1, 4)), bench.source[:2])
    bench.copy(bench.at(80, (1, 4, 5), (40, 1, 4)), bench.source[2:])
    assert bench.check() == (0, (40, 1, 4))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("part", lambda b: b.copy(b.at(0, (3, 4), (4, 1)), b.source[:3])),
        ("twice", lambda b: [b.copy(b.at(at, (6, 4), (4, 1)), b.source) for at in (0, 40)]),
        (
            "no common place",
            lambda b: [b.copy(b.at(at, (3, 4), (4, 1)), b.source[i : i + 3]) for i, at in ((0, 0), (3, 99))],
        ),
        (
            "no common order",
            lambda b: [
                b.copy(b.at(0, (3, 4), (4, 1)), b.source[:3]),
                b.copy(b.at(12, (3, 4), (1, 3)), b.source[3:]),
            ],
        ),
        # Rotary weights' halves interleaved: rows 0, 3, 1, 4, …
        ("rearranged", lambda b: b.copy(b.at(0, (3, 2, 4), (8, 4, 1)), b.source.view(2, 3, 4).transpose(0, 1))),
        ("repeated", lambda b: b.copy(b.at(0, (2, 6, 4), (24, 4, 1)), b.source)),
    ],
)
def test_what_is_no_view(name, make):
    bench = Bench(6, 4)
    make(bench)
    with pytest.raises(NotAViewError, match=name):
        bench.check()
