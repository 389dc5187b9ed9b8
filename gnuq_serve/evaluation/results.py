"""From answers to results: labels, each method's values, metrics with intervals, differences, costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gnuq_serve.calibration.arrays import BoolArray, FloatArray
from gnuq_serve.calibration.metrics import Interval, interval
from gnuq_serve.evaluation.answered import Answered
from gnuq_serve.evaluation.clustering import clustered, same_number, same_words
from gnuq_serve.evaluation.correctness import is_right
from gnuq_serve.evaluation.costs import Cost
from gnuq_serve.evaluation.methods.base import Method, Setting
from gnuq_serve.evaluation.metrics import auroc_alone, draws, with_intervals
from gnuq_serve.evaluation.question_sets import QuestionSet
from gnuq_serve.evaluation.steps import Job
from gnuq_serve.uncertainty import Uncertainty


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodResult:
    """One method on one set.

    Attributes:
        method: which.
        values: uncertainties, NaN where there is none.
        right: how many of the answers that have a value are right.
        metrics: by name, see `gnuq_serve.evaluation.metrics`, with bootstrap intervals.
        differences: AUROC minus that of another method, on answers where both have a value; paired bootstrap.
        cost: for one answer.
    """

    method: Method
    values: FloatArray
    right: int
    metrics: dict[str, Interval]
    differences: dict[str, Interval]
    cost: Cost

    @property
    def missing(self) -> int:
        """Answers without a value."""
        return int(np.isnan(self.values).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class SetResult:
    """One question set.

    Attributes:
        name: of the set.
        answers: scored and labelled.
        left_out: reasons, and how many questions each cost.
        seconds: mean of each step that was timed, one at a time; ``answer`` is the answer itself.
        methods: in the order asked for.
    """

    name: str
    answers: list[Answered]
    left_out: dict[str, int]
    seconds: dict[str, float]
    methods: list[MethodResult]

    @property
    def correct(self) -> BoolArray:
        """Labels."""
        return np.array([answer.correct for answer in self.answers], dtype=np.bool_)

    @property
    def right(self) -> int:
        """How many answers are right."""
        return int(self.correct.sum())


def labelled(one: QuestionSet, jobs: Sequence[Job], match: str) -> tuple[list[Answered], dict[str, int]]:
    """The answers of a set that have a score, marked right or wrong; and why others are left out."""
    answers: list[Answered] = []
    left_out: dict[str, int] = {}
    for job in jobs:
        answer, score = job.results.get("answer"), job.results.get("score")
        reason = _reason(answer, score)
        if reason is not None or answer is None or score is None:
            left_out[reason or "not asked"] = left_out.get(reason or "not asked", 0) + 1
            continue
        question, results = job.case.question, dict(job.results)
        if "texts" in results.get("samples", {}):
            same = same_number if one.task == "number" else same_words
            results["same_words"] = clustered(answer["text"], results["samples"]["texts"], same)
        answers.append(
            Answered(
                key=job.case.key,
                line=question.line,
                task=one.task,
                question=question.text,
                text=answer["text"],
                correct=is_right(one.task, match, question, answer["text"], answer.get("choice")),
                uncertainty=Uncertainty.from_dict(score["uncertainty"]),
                choice_log_probabilities=answer.get("choice_log_probabilities", ()),
                choice=answer.get("choice"),
                results=results,
            )
        )
    return answers, left_out


def evaluated(
    answers: Sequence[Answered],
    methods: Sequence[Method],
    setting: Setting,
    cost_of: Callable[[Method], Cost],
    *,
    against: Sequence[str],
    resamples: int,
    seed: int,
) -> list[MethodResult]:
    """Every method on the same answers and the same resamples.

    Args:
        answers: labelled.
        methods: to compare.
        setting: what methods can be told.
        cost_of: what a method costs.
        against: methods from whose AUROC each other's differs by how much.
        resamples: of the bootstrap over answers.
        seed: of the resamples.
    """
    correct = np.array([answer.correct for answer in answers], dtype=np.bool_)
    weights = draws(len(answers), resamples, seed)
    columns = {method.name: np.array(method.values(answers, setting), dtype=np.float64) for method in methods}
    found = {name: with_intervals(values, correct, weights) for name, values in columns.items()}
    return [
        MethodResult(
            method=method,
            values=columns[method.name],
            right=int(correct[np.isfinite(columns[method.name])].sum()),
            metrics=found[method.name][0],
            differences={
                other: _difference(columns[method.name], columns[other], correct, weights)
                for other in against
                if other in columns and other != method.name
            },
            cost=cost_of(method),
        )
        for method in methods
    ]


def _difference(one: FloatArray, other: FloatArray, correct: BoolArray, weights: FloatArray) -> Interval:
    both = np.isfinite(one) & np.isfinite(other)
    first, resampled = with_intervals(np.where(both, one, np.nan), correct, weights, auroc_alone)
    second, resampled_too = with_intervals(np.where(both, other, np.nan), correct, weights, auroc_alone)
    if first["auroc"].value is None or second["auroc"].value is None:
        return Interval(value=None, low=None, high=None)
    return interval(first["auroc"].value - second["auroc"].value, resampled - resampled_too)


def _reason(answer: dict[str, object] | None, score: dict[str, object] | None) -> str | None:
    for result in (answer, score):
        if result is None:
            return "not asked"
        if "failure" in result:
            return f"refused: {result['failure']}"
    uncertainty = (score or {})["uncertainty"]
    if isinstance(uncertainty, dict) and uncertainty["status"] != "scored":
        return f"{uncertainty['status']}: {uncertainty.get('reason')}"
    return None
