"""GPU memory that the engine leaves free for the scorer: vLLM takes all that it may, and takes it first."""

from __future__ import annotations

import logging
import math
import os
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

from vllm.config import CacheConfig
from vllm.platforms import current_platform

from gnuq_serve.errors import first_line
from gnuq_serve.service.settings.model import Settings
from gnuq_serve.service.settings.sources import variable
from gnuq_serve.vllm.weights_choice import gpus_of, on_engines_gpu, shares
from gnuq_serve.weights.estimate import Estimate, estimate

logger = logging.getLogger(__name__)

CONTEXT_BYTES = 3 * 2**28  # of CUDA itself and of its libraries, in each process; and what is lost between blocks
_LEAST = 0.1  # of a GPU; with less no engine starts


@dataclass(frozen=True, slots=True)
class Plan:
    """What the engine is told.

    Attributes:
        utilization: the share of a GPU that the engine may take; None: as it is.
        message: for the log.
        fits: whether there is room for both.
    """

    utilization: float | None
    message: str
    fits: bool = True


def wanted_by(args: Namespace, settings: Settings) -> Estimate | None:
    """What a scorer with weights of its own needs on a GPU of the engine; None where it is elsewhere, or unknown.

    Args:
        args: the command line of ``vllm serve``.
        settings: the operator's.
    """
    if not on_engines_gpu(settings.scorer_device, gpus_of(args)):
        return None
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # the engine may fork this process
            return pool.submit(
                estimate,
                settings.scorer_model or args.model_tag or args.model,
                args.dtype if settings.scorer_dtype == "auto" else settings.scorer_dtype,
                settings.max_batch_tokens,
                revision=args.revision,
                trust_remote_code=args.trust_remote_code,
                config_overrides=args.hf_overrides if isinstance(args.hf_overrides, dict) else None,
            ).result()
    except Exception as error:  # the server starts whatever breaks here
        logger.warning(
            "how much memory scoring needs can't be told: %s. Set --gpu-memory-utilization yourself",
            first_line(error),
        )
        return None


def leave_room(args: Namespace, settings: Settings, wanted: Estimate) -> None:
    """Lower ``--gpu-memory-utilization`` by what the scorer needs.

    A share that was set by hand stays, with a warning if it leaves too little.

    Args:
        args: the command line of ``vllm serve``; changed.
        settings: the operator's.
        wanted: by the scorer; its weights count only where it is to have a copy.
    """
    if settings.scorer_weights != "checkpoint" and shares(args):
        wanted = replace(wanted, weights=0)
    plan = plan_room(
        wanted,
        current_platform.get_device_total_memory(),
        gpus=gpus_of(args),
        utilization=args.gpu_memory_utilization,
        by_hand=args.gpu_memory_utilization != CacheConfig.gpu_memory_utilization
        or args.kv_cache_memory_bytes is not None,
        fraction=settings.scorer_gpu_memory_fraction,
    )
    logger.log(logging.INFO if plan.fits else logging.WARNING, "%s", plan.message)
    if plan.utilization is not None:
        args.gpu_memory_utilization = plan.utilization
        if settings.memory_budget is None:  # so much is free now, whatever is free when the scorer starts
            os.environ[variable("memory_budget")] = str(wanted.pass_bytes)


def plan_room(
    wanted: Estimate,
    total: int,
    *,
    gpus: int = 1,
    utilization: float,
    by_hand: bool,
    fraction: float | None = None,
) -> Plan:
    """What the engine may take, and why.

    Args:
        wanted: by the scorer.
        total: memory of one GPU, in bytes.
        gpus: over which engine and scorer are split.
        utilization: the engine's share of each.
        by_hand: whether the operator has said so.
        fraction: most that the scorer may take of each; None: what it wants.
    """
    weights = math.ceil(wanted.weights / gpus)
    need = weights + wanted.pass_bytes + CONTEXT_BYTES if fraction is None else int(fraction * total)
    parts = (
        f"the scorer needs {_gib(need)} of {_gib(total)} on a GPU: weights {_gib(weights)}, a pass "
        f"{_gib(wanted.pass_bytes)} (max_batch_tokens, memory_budget), CUDA {_gib(CONTEXT_BYTES)}"
    )
    if fraction is not None:
        parts = f"the scorer may take {_gib(need)} of {_gib(total)} on a GPU (scorer_gpu_memory_fraction)"
    if by_hand:
        if (1 - utilization) * total >= need:
            return Plan(None, f"{parts}; the engine leaves that free")
        right = _share(1 - need / total)
        return Plan(None, f"{parts}; leave it free: --gpu-memory-utilization {max(right, 0.0):g}", fits=False)
    right = _share(utilization - need / total)
    if right < _LEAST:
        return Plan(
            None,
            f"{parts}: there is no room for it beside an engine. Name another device in scorer_device, or lower "
            "max_batch_tokens",
            fits=False,
        )
    return Plan(right, f"{parts}; the engine takes the rest: --gpu-memory-utilization {right:g}")


def _share(of: float) -> float:
    """Rounded down, as one writes it."""
    return math.floor(of * 1000) / 1000


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
