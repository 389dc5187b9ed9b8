"""Asks a server for every step of every question, several at a time, from where the working file ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from gnuq_serve.calibration.collecting import Progress
from gnuq_serve.calibration.workers import run_workers
from gnuq_serve.evaluation.prompts import Prompter
from gnuq_serve.evaluation.question_sets import QuestionSet
from gnuq_serve.evaluation.server import ModelServer, RefusedError
from gnuq_serve.evaluation.steps import Generation, Job, Result, Step
from gnuq_serve.evaluation.steps.score import is_scored
from gnuq_serve.evaluation.working_file import EvaluationFile


@dataclass(frozen=True, slots=True)
class Asked:
    """What a server is asked: steps for every question, and some of them timed on the first ``timed``."""

    steps: Sequence[Step]
    to_time: Sequence[Step]
    timed: int
    concurrency: int

    def finished(self, jobs: Sequence[Job]) -> bool:
        """Nothing is left to ask."""
        return _finished(jobs, self.steps, jobs[: self.timed], self.to_time)

    async def ask(
        self, server: ModelServer, sets: Sequence[Sequence[Job]], work: EvaluationFile, progress: Progress
    ) -> None:
        """Ask for whatever is left, set by set.

        Raises:
            AnswerError: the server is gone; what was done is kept.
        """
        async with server:
            for jobs in sets:
                await _ask_all(server, jobs, self.steps, work, progress, self.concurrency)
                await _time_steps(server, jobs[: self.timed], self.to_time, work, progress)


def jobs_of(one: QuestionSet, prompter: Prompter, generation: Generation, work: EvaluationFile) -> list[Job]:
    """One job for each question of a set; their ``results`` follow the working file."""
    return [
        Job(
            set_name=one.name,
            case=case,
            prompter=prompter,
            generation=generation,
            results=work.of(one.name, case.key),
        )
        for case in one.cases
    ]


async def _ask_all(
    server: ModelServer,
    jobs: Sequence[Job],
    steps: Sequence[Step],
    work: EvaluationFile,
    progress: Progress,
    concurrency: int,
) -> None:
    """Do all steps of all jobs; what the server refuses is kept as a failure, and asked again by the next run."""
    for step in steps:
        await _ask(server, jobs, step, work, progress, concurrency)
        if step.name == "score" and any(map(_unscored, jobs)):
            # A full queue or a deadline: once more, one at a time.
            await _ask(server, jobs, step, work, progress, 1)


async def _ask(
    server: ModelServer,
    jobs: Sequence[Job],
    step: Step,
    work: EvaluationFile,
    progress: Progress,
    concurrency: int,
) -> None:
    asked = [job for job in jobs if step.applies(job.case) and _answered(step, job)]
    todo = [job for job in asked if _lacks(step, job)]
    if not todo:
        return
    bar = progress(f"{jobs[0].set_name} {step.what}", len(asked) - len(todo), len(asked))
    waiting = iter(todo)

    async def work_off() -> None:
        for job in waiting:
            work.add(job.set_name, job.case.key, step.name, await _one(server, step, job))
            bar()

    await run_workers(work_off, min(concurrency, len(todo)))


async def _one(server: ModelServer, step: Step, job: Job) -> Result:
    try:
        return await step.run(server, job)
    except RefusedError as error:
        return {"failure": str(error)}


def _finished(jobs: Sequence[Job], steps: Sequence[Step], timed: Sequence[Job], to_time: Sequence[Step]) -> bool:
    """Nothing is left to ask: the working file holds all steps of all jobs, and the timings of some."""
    lacking = any(step.applies(job.case) and _lacks(step, job) for step in steps for job in jobs)
    return not lacking and all(_timed(job, to_time) for job in timed if _has_answer(job))


def _lacks(step: Step, job: Job) -> bool:
    return step.name not in job.results or not step.done(job.results[step.name])


def _answered(step: Step, job: Job) -> bool:
    return step.name == "answer" or _has_answer(job)


def _has_answer(job: Job) -> bool:
    return "failure" not in job.results.get("answer", {"failure": ""})


def _unscored(job: Job) -> bool:
    score = job.results.get("score")
    return score is not None and "failure" not in score and not is_scored(score)


async def _time_steps(
    server: ModelServer, jobs: Sequence[Job], steps: Sequence[Step], work: EvaluationFile, progress: Progress
) -> None:
    """Ask each of these steps again, one at a time, and keep the seconds that each takes under ``timing``.

    Gradient pass, further backward pass and trace are timed as requests of their own.
    """
    todo = [job for job in jobs if _has_answer(job) and not _timed(job, steps)]
    if not todo:
        return
    bar = progress(f"{jobs[0].set_name} timing", 0, len(todo))
    for job in todo:
        seconds = {}
        for step in steps:
            if step.applies(job.case):
                start = time.perf_counter()
                result = await _one(server, step, job)
                if "failure" not in result:
                    seconds[step.what] = time.perf_counter() - start
        work.add(job.set_name, job.case.key, "timing", {"steps": [s.what for s in steps], "seconds": seconds})
        bar()


def _timed(job: Job, steps: Sequence[Step]) -> bool:
    return {step.what for step in steps} <= set(job.results.get("timing", {}).get("steps", ()))
