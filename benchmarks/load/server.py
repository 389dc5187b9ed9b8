"""The server under load, and what its processes use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from gnuq_serve.demo_model import NAME, OFFLINE, ensure_demo_model
from gnuq_serve.managed_server import CPU_ENVIRONMENT, HOST, ManagedServer, free_port
from gnuq_serve.service.scorer import title

KEY = "benchmark"
HEADERS = {"Authorization": f"Bearer {KEY}"}
_HERE = Path(__file__).parents[1]


@contextmanager
def serving(folder: Path, *arguments: str, model: Path | None = None) -> Iterator[ManagedServer]:
    """`gnuq-serve serve` with the demo model or another, ready to answer; its log is in ``folder``."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("gnuq-serve")), "serve", str(model or ensure_demo_model())]
    command += ["--served-model-name", NAME, "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    command += ["--max-num-seqs", "32", "--enable-prefix-caching", "--api-key", KEY]
    command += ["--host", HOST, "--port", str(port), "--middleware", "load.task_count.TaskCount", *arguments]
    paths = os.pathsep.join(filter(None, [str(_HERE), os.environ.get("PYTHONPATH")]))
    env = {**CPU_ENVIRONMENT, **OFFLINE, "PYTHONPATH": paths, "MKL_NUM_THREADS": "1"}
    with ManagedServer(command, env, port, folder / f"server-{port}.log") as running:
        running.wait_until_ready(["/health"], timeout=900)
        yield running


def processes(running: ManagedServer) -> list[psutil.Process]:
    """The server and all its children."""
    assert running.pid is not None
    server = psutil.Process(running.pid)
    return [server, *server.children(recursive=True)]


def scorer_of(running: ManagedServer) -> psutil.Process | None:
    """The scorer process; None while there is none."""
    return None if running.pid is None else title.scorer_of(running.pid)


class CpuClock:
    """Processor seconds of the server's processes since it was made: the scorer's, and the others' together."""

    def __init__(self, running: ManagedServer) -> None:
        self._running = running
        self._start = self._now()

    def seconds(self) -> dict[str, float]:
        """``scorer`` and ``server``."""
        now = self._now()
        return {name: now[name] - self._start[name] for name in now}

    def _now(self) -> dict[str, float]:
        scorer = scorer_of(self._running)
        seconds = {"scorer": 0.0, "server": 0.0}
        for process in processes(self._running):
            times = process.cpu_times()
            seconds["scorer" if process == scorer else "server"] += times.user + times.system
        return seconds


def footprint(running: ManagedServer) -> dict[str, Any]:
    """Memory in MiB (not counting what is shared with others), file descriptors and threads, by process."""
    found: dict[str, Any] = {}
    scorer = scorer_of(running)
    for number, process in enumerate(processes(running)):
        name = "scorer" if process == scorer else f"{number}: {process.name()}"
        found[name] = {
            "uss_mib": process.memory_full_info().uss / 2**20,
            "fds": process.num_fds(),
            "threads": process.num_threads(),
        }
    return found


def total(prints: dict[str, Any], what: str) -> float:
    """Sum over all processes."""
    return float(sum(one[what] for one in prints.values()))


def names(prints: Sequence[dict[str, Any]]) -> list[str]:
    """The processes that are in all of them."""
    return [name for name in prints[0] if all(name in other for other in prints)]
