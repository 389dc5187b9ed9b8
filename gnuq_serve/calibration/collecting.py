"""Which questions need an answer, and getting them all: from the working file, else from a model."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from gnuq_serve.calibration.answers import AnswerError, AnswerSource, Sampling
from gnuq_serve.calibration.binding import chat_parts, system_part
from gnuq_serve.calibration.questions import Question
from gnuq_serve.calibration.working_file import Answer, WorkingFile

_Any = TypeVar("_Any")

# (what, how many are done, of how many) -> called after each further one.
Progress = Callable[[str, int, int], Callable[[], None]]


def needs_answer(question: Question) -> bool:
    """The row brings no score."""
    return question.uncertainty is None


def sample(questions: Sequence[_Any], limit: int | None, seed: int) -> list[_Any]:
    """A random ``limit`` of the questions, in the file's order; a larger limit keeps those of a smaller one."""
    if limit is None or limit >= len(questions):
        return list(questions)
    order = list(range(len(questions)))
    random.Random(seed).shuffle(order)  # noqa: S311
    return [questions[at] for at in sorted(order[:limit])]


def without_repeats(questions: Sequence[Question]) -> list[Question]:
    """Questions that the model is asked twice count once: the second answer would be the first again."""
    seen: set[str] = set()
    kept = []
    for question in questions:
        if needs_answer(question):
            if question.key in seen:
                continue
            seen.add(question.key)
        kept.append(question)
    return kept


def collect(
    questions: Sequence[Question], source: AnswerSource | None, work: WorkingFile | None, progress: Progress
) -> dict[str, Answer]:
    """Answers for all questions that need one: from the working file, else from the source.

    What the working file holds without a score (a refusal, a full queue) is asked again.

    Raises:
        AnswerError: the source is gone, or the scorer behind it changed on the way.
    """
    asked = [question for question in questions if needs_answer(question)]
    if not asked or source is None or work is None:
        return {}
    known = {question.key for question in asked}
    fingerprints = {
        answer.score.fingerprint for key, answer in work.answers.items() if key in known and answer.scored
    }
    todo = [question for question in asked if not (work.answers.get(question.key) or Answer(key="")).scored]
    step = progress("answers", len(asked) - len(todo), len(asked))

    def keep(answer: Answer) -> None:
        if answer.scored:
            fingerprints.add(answer.score.fingerprint)
            if len(fingerprints) > 1:
                raise AnswerError(
                    f"the scorer changed (fingerprints {', '.join(sorted(map(str, fingerprints)))}): one "
                    f"calibration is for one model. Name another --working-file than {work.path} to start anew"
                )
        work.add(answer)
        step()

    source.answer(todo, keep)
    return {question.key: work.answers[question.key] for question in asked}


def fingerprint_parts(
    sampling: Sampling, questions: Sequence[Question], request: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """What a calibration is bound to besides the scorer's fingerprint; see `gnuq_serve.calibration.binding`.

    A part in which the questions differ is not bound.

    Args:
        sampling: how answers were asked for.
        questions: the questions asked.
        request: further fields of each request.
    """
    asked = [question for question in questions if needs_answer(question)]
    if not asked:
        return _logged_parts(questions)
    parts = chat_parts({**asdict(sampling), **(request or {})}, defaults={})
    systems = {system_part(question.messages) for question in asked}
    parts["system_prompt"] = systems.pop()
    if systems:
        del parts["system_prompt"]
    if any(question.answer is not None for question in asked):  # given answers: nobody knows how they were drawn
        del parts["sampling"]
    return parts


def _logged_parts(questions: Sequence[Question]) -> dict[str, str]:
    """The parts that all rows of a server's log have in common."""
    logged = [question.extra.get("parts") for question in questions]
    known = [parts for parts in logged if isinstance(parts, Mapping)]
    if not known or len(known) < len(logged):
        return {}
    return {
        str(name): str(value)
        for name, value in known[0].items()
        if all(parts.get(name) == value for parts in known)
    }
