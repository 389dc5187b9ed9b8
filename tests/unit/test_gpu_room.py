"""The share of a GPU that `gnuq-serve serve` gives to the engine."""

from argparse import Namespace

import pytest

pytest.importorskip("vllm")

from gnuq_serve.service.settings.model import load_settings
from gnuq_serve.vllm import room
from gnuq_serve.vllm.names import EXTENSION, LOAD_FORMAT
from gnuq_serve.vllm.room import CONTEXT_BYTES, leave_room, plan_room
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
    ("weights", "load_format", "copy"),
    [
        ("auto", "auto", 1),
        ("auto", LOAD_FORMAT, 0),
        ("shared", LOAD_FORMAT, 0),
        ("checkpoint", LOAD_FORMAT, 1),
        ("checkpoint", "auto", 1),
    ],
)
def test_a_copy_has_room_where_there_is_to_be_one(weights, load_format, copy, monkeypatch):
    monkeypatch.setattr(room.current_platform, "get_device_total_memory", lambda: 80 * GIB, raising=False)
    monkeypatch.setenv("GNUQ_MEMORY_BUDGET", "")  # set by what is tested: taken back afterwards
    args = Namespace(
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        load_format=load_format,
        worker_extension_cls=EXTENSION,
        gpu_memory_utilization=0.92,
        kv_cache_memory_bytes=None,
    )
    leave_room(args, load_settings(flags={"scorer_weights": weights}), WANTED)
    need = copy * WANTED.weights + WANTED.pass_bytes + CONTEXT_BYTES
    assert args.gpu_memory_utilization == pytest.approx(0.92 - need / (80 * GIB), abs=1.1e-3)
