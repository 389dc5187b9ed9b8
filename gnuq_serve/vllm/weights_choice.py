"""Whose weights the scorer reads where ``scorer_weights`` is ``auto``: on a GPU the engine's, if it can."""

from __future__ import annotations

from argparse import Namespace

from gnuq_serve.service.settings.model import Settings
from gnuq_serve.vllm.names import EXTENSION, LOAD_FORMAT, LOGPROBS_MODES

_DECIDED = "gnuq_not_shared"  # attribute of a command line: why the engine was not told to share its weights


def against_sharing(args: Namespace, settings: Settings) -> str | None:
    """What keeps a scorer on the engine's GPU from reading its weights; None: nothing that is known beforehand.

    Args:
        args: the command line of ``vllm serve``.
        settings: the operator's.
    """
    for name in ("scorer_model", "scorer_device_map"):
        if (value := getattr(settings, name)) is not None:
            return f"{name} is {value}"
    if settings.scorer_dtype != "auto":
        return f"scorer_dtype is {settings.scorer_dtype}"
    if not on_engines_gpu(settings.scorer_device, gpus := gpus_of(args)):
        return f"scorer_device is {settings.scorer_device}, and the engine's weights are on a GPU"
    if gpus > 1:
        return f"the engine's weights are split over {gpus} GPUs (tensor or pipeline parallel)"
    if args.quantization is not None:
        return f"the engine's weights are quantised (--quantization {args.quantization})"
    if args.enable_sleep_mode or args.enable_cumem_allocator:
        return "no other process can open the memory of vLLM's sleep mode (--enable-sleep-mode)"
    if args.cpu_offload_gb > 0 or args.offload_group_size > 0:
        return "some of the engine's weights are not on the GPU (--cpu-offload-gb, --offload-group-size)"
    if args.logprobs_mode not in LOGPROBS_MODES:
        return f"they can't be checked with --logprobs-mode {args.logprobs_mode}"
    if args.load_format not in ("auto", LOAD_FORMAT):
        return f"--load-format {args.load_format} was given, and sharing has one of its own"
    if args.worker_extension_cls not in ("", EXTENSION):
        return f"--worker-extension-cls {args.worker_extension_cls} was given, and sharing has one of its own"
    return None


def choose(args: Namespace, settings: Settings, against_model: str | None = None) -> None:
    """Have an engine on a GPU share its weights, where that is left to us and nothing speaks against it.

    Args:
        args: the command line of ``vllm serve``; changed.
        settings: the operator's.
        against_model: what in the model speaks against it.
    """
    if settings.scorer_weights != "auto":
        return
    against = against_sharing(args, settings) or against_model
    if against is None:
        args.load_format, args.worker_extension_cls = LOAD_FORMAT, EXTENSION
    else:
        setattr(args, _DECIDED, against)


def shares(args: Namespace) -> bool:
    """Whether the engine is told to share its weights."""
    return bool(args.load_format == LOAD_FORMAT and args.worker_extension_cls == EXTENSION)


def not_shared(args: Namespace, settings: Settings) -> str | None:
    """Why the scorer can't even try to read the weights of an engine on a GPU; None: it can.

    Args:
        args: the command line of ``vllm serve``, as it was run.
        settings: the operator's.
    """
    against: str | None = getattr(args, _DECIDED, None) or against_sharing(args, settings)
    if against is None and not shares(args):
        return (
            f"vLLM was not told to share them: gnuq-serve serve does, or --load-format {LOAD_FORMAT} "
            f"--worker-extension-cls {EXTENSION}"
        )
    return against


def gpus_of(args: Namespace) -> int:
    """Over which one copy of the engine's weights is split."""
    return int(args.tensor_parallel_size * args.pipeline_parallel_size)


def on_engines_gpu(device: str, gpus: int) -> bool:
    """Whether a scorer on this device is on one of the engine's GPUs."""
    kind, _, number = device.partition(":")
    return kind == "auto" or (kind == "cuda" and int(number or 0) < gpus)
