"""Whether a scorer on a GPU is to read the engine's weights: what is known before the engine starts."""

import asyncio
from argparse import Namespace

import pytest

from gnuq_serve.service.settings.model import load_settings
from gnuq_serve.vllm.names import EXTENSION, LOAD_FORMAT
from gnuq_serve.vllm.weights_choice import against_sharing, choose, not_shared, on_engines_gpu, shares

# What vLLM's parser gives where nothing is said.
PLAIN = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "quantization": None,
    "enable_sleep_mode": False,
    "enable_cumem_allocator": False,
    "cpu_offload_gb": 0,
    "offload_group_size": 0,
    "logprobs_mode": "raw_logprobs",
    "load_format": "auto",
    "worker_extension_cls": "",
}


def line(**changes):
    return Namespace(**PLAIN | changes)


def settings(**changes):
    return load_settings().model_copy(update=changes)


# (flags of vLLM, settings of ours, what is said)
AGAINST = [
    ({}, {"scorer_model": "other/model"}, "scorer_model is other/model"),
    ({}, {"scorer_device_map": "balanced"}, "scorer_device_map is balanced"),
    ({}, {"scorer_dtype": "float32"}, "scorer_dtype is float32"),
    ({}, {"scorer_device": "cpu"}, "scorer_device is cpu"),
    ({}, {"scorer_device": "cuda:1"}, "scorer_device is cuda:1"),
    ({"tensor_parallel_size": 2}, {}, "split over 2 GPUs"),
    ({"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, {}, "split over 4 GPUs"),
    ({"quantization": "fp8"}, {}, "--quantization fp8"),
    ({"enable_sleep_mode": True}, {}, "--enable-sleep-mode"),
    ({"enable_cumem_allocator": True}, {}, "--enable-sleep-mode"),
    ({"cpu_offload_gb": 1.5}, {}, "--cpu-offload-gb"),
    ({"offload_group_size": 2}, {}, "--offload-group-size"),
    ({"logprobs_mode": "raw_logits"}, {}, "--logprobs-mode raw_logits"),
    ({"load_format": "dummy"}, {}, "--load-format dummy"),
    ({"worker_extension_cls": "mine.Extension"}, {}, "--worker-extension-cls mine.Extension"),
]


@pytest.mark.parametrize(("flags", "ours", "reason"), AGAINST)
def test_what_speaks_against_it(flags, ours, reason):
    args, chosen = line(**flags), settings(**ours)
    assert reason in against_sharing(args, chosen)
    choose(args, chosen)
    assert not shares(args)
    assert reason in not_shared(args, chosen)


@pytest.mark.parametrize("flags", [{}, {"logprobs_mode": "processed_logprobs"}])
@pytest.mark.parametrize("ours", [{}, {"scorer_device": "cuda"}, {"scorer_device": "cuda:0"}])
def test_auto_shares_where_nothing_does(flags, ours):
    args, chosen = line(**flags), settings(**ours)
    choose(args, chosen)
    assert (args.load_format, args.worker_extension_cls) == (LOAD_FORMAT, EXTENSION)
    assert shares(args)
    assert not_shared(args, chosen) is None


def test_what_the_model_has_against_it_is_told_later():
    args = line()
    choose(args, settings(), "experts: merged")
    assert not shares(args)
    assert not_shared(args, settings()) == "experts: merged"


@pytest.mark.parametrize("weights", ["checkpoint", "shared"])
def test_asked_by_name_nothing_is_chosen(weights):
    args = line()
    choose(args, settings(scorer_weights=weights))
    assert vars(args) == PLAIN


def test_a_server_started_by_hand_is_told_the_flags():
    assert "--load-format gnuq --worker-extension-cls" in not_shared(line(), settings())
    given = line(load_format=LOAD_FORMAT, worker_extension_cls=EXTENSION)
    assert not_shared(given, settings()) is None


def test_vllm_has_these_flags():
    pytest.importorskip("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    assert {name: getattr(parsed, name) for name in PLAIN} == PLAIN
    assert against_sharing(parsed, settings()) is None


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [("auto", 1, True), ("cpu", 1, False), ("cuda", 1, True), ("cuda:1", 1, False), ("cuda:1", 2, True)],
)
def test_where_the_scorer_is(device, gpus, expected):
    assert on_engines_gpu(device, gpus) == expected


@pytest.mark.parametrize(
    ("weights", "device", "expected"),
    [("checkpoint", "cuda", None), ("auto", "cpu", None), ("auto", "cuda", "vLLM was not told to share them")],
)
def test_the_plugin_asks_only_an_engine_that_shares(weights, device, expected, monkeypatch):
    from gnuq_serve.vllm.plugin import GnuqPlugin

    monkeypatch.setenv("GNUQ_SCORER_WEIGHTS", weights)
    engine = Namespace(
        vllm_config=Namespace(device_config=Namespace(device_type=device))
    )  # nothing else is asked
    shared, refused = asyncio.run(GnuqPlugin()._shared_weights(engine, line()))
    assert shared is None
    assert refused == expected or refused.startswith(expected)
