"""What each method costs beyond the answer: passes, seconds on the same server, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from gnuq_serve.evaluation.methods.base import Method
from gnuq_serve.evaluation.steps import HERE, Job, Step
from gnuq_serve.evaluation.steps.answer import ANSWER
from gnuq_serve.evaluation.steps.asking import P_TRUE, SAMPLES, VERBALIZED
from gnuq_serve.evaluation.steps.score import score_step

# Of each step that a method can pay for; T: tokens of the answer, N: samples.
PASSES = {
    "gradient": "1 forward, 1 backward",
    "semantic": "1 forward, 2 backward",
    "trace": "1 forward, 1 backward, T gradient norms",
    "hidden": "1 forward",
    "positions": "1 forward, 1 backward",
    "p_true": "1 forward",
    "verbalized": "1 short answer",
    "samples": "N answers",
    "same_words": "",
    "encoder": "N + 1 encodings",
    "nli": "up to 2 N pairs a cluster",
}
_BY_THE_SCORER = ("gradient", "semantic", "trace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One method's cost for one answer, on average over the questions that were timed.

    Attributes:
        passes: in words; empty: free.
        seconds: one answer at a time; None: not measured.
        samples: further answers that it generates.
        memory: bytes beyond the serving engine's; None: not known.
    """

    passes: str
    seconds: float | None
    samples: int = 0
    memory: int | None = None


def timed_steps(methods: Sequence[Method]) -> list[Step]:
    """What to time for these methods, named as they name what they pay; the answer comes first."""
    wanted = {step for method in methods for step in method.pays}
    steps = {
        "gradient": score_step(()),
        "semantic": score_step(("semantic",)),
        "trace": score_step(("trace",)),
        "p_true": P_TRUE,
        "verbalized": VERBALIZED,
        "samples": SAMPLES,
    }
    return [
        replace(ANSWER, what="answer"),
        *(replace(step, what=name) for name, step in steps.items() if name in wanted),
    ]


def step_seconds(jobs: Sequence[Job]) -> dict[str, float]:
    """Mean seconds of each step over the questions on which it was timed."""
    seconds: dict[str, list[float]] = {}
    for job in jobs:
        for name, value in job.results.get("timing", {}).get("seconds", {}).items():
            seconds.setdefault(name, []).append(value)
        for name in HERE:
            if name in job.results:
                seconds.setdefault(name, []).append(job.results[name]["seconds"])
    return {name: fmean(values) for name, values in seconds.items()}


def cost_of(
    method: Method, seconds: Mapping[str, float], memory: Mapping[str, int], samples: int, *, sampled: bool
) -> Cost:
    """One method's cost.

    Args:
        method: it.
        seconds: of each step, see `step_seconds`.
        memory: bytes of each step's model, see `step_memory`.
        samples: how many are drawn.
        sampled: False: choices have probabilities, and nothing was sampled.
    """
    pays = [step for step in method.pays if sampled or "samples" not in method.pays]
    known = [seconds.get(step, 0.0 if step == "same_words" else None) for step in pays]
    sizes = [memory.get(step, None if step in _BY_THE_SCORER else 0) for step in pays]
    return Cost(
        passes=", ".join(PASSES[step] for step in pays if PASSES[step]),
        seconds=None if None in known else sum(value for value in known if value is not None),
        samples=samples if "samples" in pays else 0,
        memory=None if None in sizes else sum(size for size in sizes if size is not None),
    )


def step_memory(jobs: Sequence[Job], scorer: int | None) -> dict[str, int]:
    """Bytes of the scorer's process, and of the models in this one."""
    found = {} if scorer is None else dict.fromkeys(_BY_THE_SCORER, scorer)
    for job in jobs:
        for name in HERE:
            if name in job.results:
                found[name] = job.results[name]["bytes"]
    return found


def scorer_peak(server_pid: int) -> int | None:
    """Largest memory that the scorer's process ever had, in bytes; None where there is none to be found."""
    from gnuq_serve.service.scorer.title import scorer_of

    if (process := scorer_of(server_pid)) is None:
        return None
    with suppress(OSError, StopIteration):
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return None
