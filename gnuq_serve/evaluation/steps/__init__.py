"""Steps of an evaluation, in their order: what a method `needs`."""

from __future__ import annotations

from collections.abc import Collection

from gnuq_serve.evaluation.steps.answer import ANSWER
from gnuq_serve.evaluation.steps.asking import P_TRUE, SAMPLES, VERBALIZED
from gnuq_serve.evaluation.steps.base import Generation, Job, Result, Results, Step
from gnuq_serve.evaluation.steps.score import OPTIONS, score_step

# What any server with uncertainty on its answers can give; `same_words` follows from the samples.
ON_A_SERVER = ("score", "semantic", "trace", "p_true", "verbalized", "samples", "same_words")
# What needs a model in this process.
HERE = ("hidden", "positions", "encoder", "nli")

__all__ = ["HERE", "ON_A_SERVER", "Generation", "Job", "Result", "Results", "Step", "server_steps"]


def server_steps(needed: Collection[str]) -> list[Step]:
    """The steps to ask a server for, in order; every answer is scored."""
    steps = [ANSWER, score_step([option for option in OPTIONS if option in needed])]
    return steps + [step for step in (P_TRUE, VERBALIZED, SAMPLES) if step.name in needed]
