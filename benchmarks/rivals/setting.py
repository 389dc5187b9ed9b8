"""Where and with what the figures were taken: machine, threads, model."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from gnuq_serve import Scorer
from gnuq_serve.demo_model import NAME, ensure_demo_model
from gnuq_serve.gradnorm.oracle import count_padding_rows


def load_scorer(threads: int, **options: Any) -> Scorer:
    """The demo model in float32 on the CPU, with that many torch threads."""
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    scorer = Scorer.from_pretrained(str(ensure_demo_model()), "float32", "cpu", **options)
    count_padding_rows(scorer.model)  # chat templates hold the pad token: all rivals must agree on it
    return scorer


def facts(threads: int) -> dict[str, Any]:
    """Facts of the machine and the versions."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "model": NAME,
        "dtype": "float32",
        "threads": threads,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_at_start": os.getloadavg()[0],
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
