"""The share of a GPU that `gnuq-serve serve` gives to the engine."""

import pytest

pytest.importorskip("vllm")

from gnuq_serve.vllm.room import CONTEXT_BYTES, _on_engines_gpu, plan_room
from gnuq_serve.weights.estimate import Estimate

GIB = 2**30
WANTED = Estimate(weights=16 * GIB, pass_bytes=8 * GIB)


def plan(total=80, **options):
    return plan_room(WANTED, total * GIB, **{"utilization": 0.92, "by_hand": False} | options)


@pytest.mark.parametrize("gpus", [1, 2])
def test_what_the_scorer_needs_stays_free(gpus):
    found = plan(gpus=gpus)
    need = WANTED.weights // gpus + WANTED.pass_bytes + CONTEXT_BYTES
    assert found.fits
    left = (0.92 - found.utilization) * 80 * GIB
    assert need <= left < need + 0.001 * 80 * GIB
    assert f"--gpu-memory-utilization {found.utilization:g}" in found.message


def test_a_share_by_hand_stays():
    enough = plan(utilization=0.5, by_hand=True)
    assert (enough.utilization, enough.fits) == (None, True)
    too_little = plan(utilization=0.9, by_hand=True)
    assert (too_little.utilization, too_little.fits) == (None, False)
    assert "--gpu-memory-utilization 0.69" in too_little.message  # 24.75 of 80 GiB are the scorer's


def test_no_room():
    found = plan(total=24)
    assert (found.utilization, found.fits) == (None, False)
    assert "scorer_device" in found.message


def test_the_scorers_own_share_counts():
    assert plan(fraction=0.25).utilization == 0.67


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [("auto", 1, True), ("cpu", 1, False), ("cuda", 1, True), ("cuda:1", 1, False), ("cuda:1", 2, True)],
)
def test_where_the_scorer_is(device, gpus, expected):
    assert _on_engines_gpu(device, gpus) == expected
