"""How many requests wait in the engine, so that the scorer can yield to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

WAITING = "vllm:num_requests_waiting"

# Requests that wait in the engine now; None where that is not known. Asked some times a second on the event loop.
EngineLoad = Callable[[], "float | None"]


def waiting_in_this_server(registry: CollectorRegistry = REGISTRY) -> float | None:
    """By vLLM's own gauge, summed over its engines.

    With several API server processes, an engine reports to one of them at a time: then the newest report to any
    of them, which prometheus_client keeps in files.

    Args:
        registry: the process's own metrics.
    """
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder is None:
        return _waiting(registry.restricted_registry([WAITING]).collect())
    files = [str(path) for path in Path(folder).glob("gauge_mostrecent_*.db")]
    return _waiting(MultiProcessCollector.merge(files, accumulate=True))


def _waiting(metrics: Iterable[Any]) -> float | None:
    values = [sample.value for metric in metrics if metric.name == WAITING for sample in metric.samples]
    return sum(values) if values else None
