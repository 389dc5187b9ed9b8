"""Peak memory of one scoring call beyond the weights, in a process of its own. Linux only.

The process loads the model, scores a tiny sample by the same method, reads its resident memory, lets the kernel
forget the peak so far, scores, and reads the peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gnuq_serve import Sample

# glibc raises its mmap threshold as large blocks are freed, and then keeps what later ones leave behind: the
# warm-up's freed gradients would be taken for memory in use. A fixed threshold returns large blocks at once.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


@dataclass(frozen=True, slots=True)
class Job:
    """What to measure: a rival's name, samples as (prompt ids, answer ids), options of our scorer."""

    method: str
    samples: list[tuple[list[int], list[int]]]
    threads: int
    scorer_options: dict[str, Any]
    score_options: dict[str, Any]


def peak_mib(
    method: str,
    samples: Sequence[Sample],
    *,
    threads: int,
    scorer_options: dict[str, Any] | None = None,
    score_options: dict[str, Any] | None = None,
) -> float:
    """Peak resident memory in MiB beyond what was there before the call.

    Raises:
        RuntimeError: the measuring process failed; the message ends with what it said.
    """
    pairs = [(list(sample.prompt_ids), list(sample.answer_ids)) for sample in samples]
    job = Job(method, pairs, threads, scorer_options or {}, score_options or {})
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "rivals.peak"],
        input=json.dumps(asdict(job)),
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {method} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def _measure(job: Job) -> float:
    import rivals
    from rivals.ours import GradientPass
    from rivals.setting import load_scorer

    scorer = load_scorer(job.threads, **job.scorer_options)
    ours = job.method == rivals.OURS
    method = GradientPass(scorer, **job.score_options) if ours else rivals.build(job.method, scorer)
    samples = [Sample(prompt, answer) for prompt, answer in job.samples]
    warm_up = [Sample(samples[0].prompt_ids[:2], samples[0].prompt_ids[2:4])]
    method(warm_up)
    if hasattr(method, "prepare"):
        method.prepare(samples)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib("VmRSS")
    method(samples)
    return _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    # Not getrusage: its peak is inherited from the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    print(_measure(Job(**json.load(sys.stdin))))
