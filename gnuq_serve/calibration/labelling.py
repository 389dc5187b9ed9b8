"""From questions and answers to rows for the fit: which answers are scored, and which are right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gnuq_serve.calibration.collecting import Progress, needs_answer
from gnuq_serve.calibration.judging import judge_all, judge_name
from gnuq_serve.calibration.questions import Question
from gnuq_serve.calibration.row_reader import DataError
from gnuq_serve.calibration.rows import Row
from gnuq_serve.calibration.working_file import Answer, WorkingFile
from gnuq_serve.matching import Judge, Matcher, MatchError


@dataclass(slots=True)
class Labelled:
    """Rows for the fit, and what did not become one.

    Attributes:
        rows: scored and labelled answers.
        questions: the question of each row.
        texts: the answer's text of each row, where it is known.
        left_out: reasons, each with the number of questions that it cost.
    """

    rows: list[Row] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def leave_out(self, reason: str) -> None:
        """Count one question that gives no row."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1


def check_references(questions: Iterable[Question], match: Matcher) -> None:
    """Raise before a model is asked, where a row lacks what the matcher compares with.

    Raises:
        DataError: names file and line.
    """
    for question in questions:
        if question.correct is None and question.labelled:
            try:
                match("", question.reference)
            except MatchError as error:
                raise DataError(f"{question.path}, line {question.line}: {error}") from error


def label(
    questions: Sequence[Question],
    answers: dict[str, Answer],
    match: Matcher,
    *,
    work: WorkingFile | None = None,
    progress: Progress,
    concurrency: int = 8,
) -> Labelled:
    """Say of each answer whether it is right: the user's own label, else the matcher."""
    result = Labelled()
    pending: list[tuple[Question, Answer]] = []
    for question in questions:
        if needs_answer(question):
            answer = answers[question.key]
        else:
            answer = Answer(
                key=question.key,
                text=question.answer or "",
                uncertainty=question.uncertainty,
                finish_reason=_word(question, "finish_reason"),
                prompt_tokens=_count(question, "prompt_tokens"),
            )
        if not question.labelled:
            result.leave_out("not labelled")
        elif answer.failure is not None:
            result.leave_out(f"refused: {answer.failure}")
        elif not answer.scored:
            score = answer.uncertainty
            result.leave_out("no score" if score is None else f"{score.status}: {score.reason}")
        else:
            pending.append((question, answer))
    verdicts = _verdicts(pending, match, work, progress, concurrency)
    for (question, answer), correct in zip(pending, verdicts, strict=True):
        if correct is None:
            result.leave_out("the judge gave no verdict")
            continue
        result.questions.append(question)
        result.texts.append(answer.text or None)
        result.rows.append(
            Row(
                uncertainty=answer.score,
                correct=correct,
                group=question.group,
                prompt_tokens=answer.prompt_tokens,
                turns=_turns(question),
                finish_reason=answer.finish_reason,
                key=str(question.line),
            )
        )
    return result


def _verdicts(
    pending: Sequence[tuple[Question, Answer]],
    match: Matcher,
    work: WorkingFile | None,
    progress: Progress,
    concurrency: int,
) -> list[bool | None]:
    if not isinstance(match, Judge):
        return [
            match(answer.text, question.reference) if question.correct is None else question.correct
            for question, answer in pending
        ]
    name = judge_name(match)
    known = work.verdicts if work is not None else {}
    verdicts = [
        known.get((question.key, name)) if question.correct is None else question.correct
        for question, _ in pending
    ]
    todo = [at for at, verdict in enumerate(verdicts) if verdict is None]
    step = progress("verdicts", len(pending) - len(todo), len(pending))

    def keep(index: int, correct: bool | None) -> None:
        verdicts[todo[index]] = correct
        if correct is not None and work is not None:
            work.add_verdict(pending[todo[index]][0].key, name, correct)
        step()

    cases = [(pending[at][1].text, pending[at][0].reference) for at in todo]
    judge_all(match, cases, concurrency=concurrency, on_verdict=keep)
    return verdicts


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON Lines, without any text (groups as digests); ``--data`` reads them."""
    with Path(path).open("w", encoding="utf-8") as file:
        for row in rows:
            data: dict[str, Any] = {
                "key": row.key,
                "group": None if row.group is None else hashlib.sha256(row.group.encode()).hexdigest()[:16],
                "correct": row.correct,
                "prompt_tokens": row.prompt_tokens,
                "turns": row.turns,
                "finish_reason": row.finish_reason,
                "uncertainty": row.uncertainty.to_dict(),
            }
            file.write(json.dumps(data) + "\n")


def _turns(question: Question) -> int | None:
    if question.messages:
        return len([turn for turn in question.messages if turn["role"] == "user"])
    return _count(question, "turns")


def _count(question: Question, column: str) -> int | None:
    value: object = question.extra.get(column)
    if value is None:
        return None
    if not str(value).isdigit():
        raise DataError(
            f"{question.path}, line {question.line}: `{column}` must be a whole number, not {value!r:.60}"
        )
    return int(str(value))


def _word(question: Question, column: str) -> str | None:
    value = question.extra.get(column)
    return None if value is None else str(value)
