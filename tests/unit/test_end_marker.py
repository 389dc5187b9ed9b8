import pytest

from gnuq_serve.service.proxy.end_marker import thinking_until


@pytest.mark.parametrize(
    ("marker", "answer", "length"),
    [
        ([9], [1, 2, 9, 3, 4], 3),
        ([9], [9, 3], 1),
        ([9], [1, 9, 2, 9, 3], 2),  # the first one ends it
        ([9], [1, 2, 3], None),
        ([9], [1, 2, 9], None),  # no answer follows: nothing to tell apart
        ([8, 9], [1, 8, 9, 3], 3),
        ([8, 9], [8, 1, 9, 8, 8, 9, 3], 6),
        ([8, 9], [9], None),
        ([8, 9], [], None),
    ],
)
def test_thinking_ends_behind_the_marker(marker, answer, length):
    assert thinking_until(marker)(answer, {}) == length
