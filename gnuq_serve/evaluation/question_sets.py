"""Question sets: files of questions, or sets from a hub, each read as one task.

Tasks: ``open`` (``answers``, or ``correct_answers`` and ``incorrect_answers``), ``number`` (the same, compared as
numbers), ``choice`` (``choices`` and ``label``, or ``mc1_choices`` and ``mc1_label``), ``binary`` (TruthfulQA's
``best_answer`` against its ``best_incorrect_answer``).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from gnuq_serve.calibration.collecting import sample
from gnuq_serve.calibration.questions import Question, questions_of
from gnuq_serve.calibration.row_reader import DataError, Record, read_rows
from gnuq_serve.evaluation.hub import FORM, PREFIX, read_hub

Task = Literal["open", "number", "choice", "binary"]
BARE = "{question}"
_NUMBER = re.compile(r"[-+\u2212]?[\d.,/ ]+%?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A question of a set; its key also tells apart the same question with other choices."""

    key: str
    question: Question

    @property
    def choices(self) -> tuple[str, ...]:
        """In the order shown."""
        return self.question.reference.choices


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionSet:
    """A file, or a split of a hub's set, read as one task.

    Attributes:
        name: what was read (a file's name alone), and the task.
        task: how it is asked and compared.
        cases: what is asked.
        shots: questions kept out of ``cases``, for prompts with examples.
        left_out: rows that are no question of this task.
    """

    name: str
    task: Task
    cases: tuple[Case, ...]
    shots: tuple[Case, ...] = ()
    left_out: int = 0


def read_sets(
    names: str,
    *,
    limit: int | None = None,
    shots: int = 0,
    seed: int = 0,
    letters: str | None = None,
    system: str | None = None,
) -> list[QuestionSet]:
    """Read question sets.

    Args:
        names: files, folders of ``*.jsonl`` and ``hub:OWNER/NAME[/CONFIG][@SPLIT]`` (see `read_hub`), parted by
            commas; ``:TASK`` behind one names its task.
        limit: a random N questions of each.
        shots: how many questions of each to keep for prompts with examples.
        seed: of the order of choices, of ``limit`` and of ``shots``.
        letters: how a question is put with its lettered choices; None: the bare question.
        system: a system prompt before every question.

    Raises:
        DataError: a file or row can't be used, or too few rows are left.
        ImportError: a set from a hub is named, and ``datasets`` is not installed.
    """
    found = []
    for name, task in _named(names):
        one = _read(name, task, seed=seed, letters=letters, system=system)
        if len(one.cases) <= shots:
            raise DataError(
                f"{name}: {len(one.cases)} questions, of which --few-shot takes {shots}: none are left"
            )
        order = list(range(len(one.cases)))
        random.Random(f"{seed}:shots").shuffle(order)  # noqa: S311
        kept = sorted(order[shots:])
        cases = sample([one.cases[at] for at in kept], limit, seed)
        examples = tuple(one.cases[at] for at in order[:shots])
        found.append(
            QuestionSet(name=one.name, task=one.task, cases=tuple(cases), shots=examples, left_out=one.left_out)
        )
    repeated = [one.name for one in found]
    if len(set(repeated)) < len(repeated):
        raise DataError(f"--data {names}: names a set twice: {', '.join(repeated)}")
    return found


def _named(names: str) -> Iterator[tuple[str, Task | None]]:
    """Each file, and each set from a hub, with the task that is named."""
    for name in filter(None, names.split(",")):
        before, colon, task = name.rpartition(":")
        named = cast("Task | None", task if colon and task in get_args(Task) else None)
        path = Path(before if named else name)
        if name.startswith(PREFIX):
            if named is None and name.count(":") > 1:
                raise DataError(
                    f"{name}: {task!r} is no task; tasks: {', '.join(get_args(Task))}; the form is {FORM}"
                )
            yield (before if named else name), named
        elif path.is_dir():
            if not (files := sorted(path.glob("*.jsonl"))):
                raise DataError(f"{path}: no *.jsonl in this folder")
            yield from ((str(file), named) for file in files)
        elif not path.exists() and colon and named is None:
            raise DataError(f"{name}: no such file, and {task!r} is no task; tasks: {', '.join(get_args(Task))}")
        else:
            yield str(path), named


def _rows(name: str) -> tuple[str, list[Record], int]:
    """The set's name, its rows, and how many were none."""
    if name.startswith(PREFIX):
        found = read_hub(name)
        return found.name, found.rows, found.unfit
    path = Path(name)
    if not (rows := list(read_rows(path))):
        raise DataError(f"{path}: no rows")
    return path.stem, rows, 0


def _read(name: str, task: Task | None, *, seed: int, letters: str | None, system: str | None) -> QuestionSet:
    stem, rows, left_out = _rows(name)
    task = task or _task_of(rows)
    records = []
    for row in rows:
        if (plain := _plain(row.row, task)) is None:
            left_out += 1
        else:
            records.append(Record(row.path, row.line, plain))
    # Choices are shuffled even where the prompt does not show them: a tie must not fall to the first.
    questions = questions_of(records, seed=seed, system=system, choice_prompt=letters or BARE)
    cases = {(key := _key(question)): Case(key=key, question=question) for question in reversed(questions)}
    if not cases:
        raise DataError(f"{name}: no row is a question of the task {task}")
    return QuestionSet(
        name=f"{stem}:{task}",
        task=task,
        cases=tuple(sorted(cases.values(), key=lambda case: case.question.line)),
        left_out=left_out + len(questions) - len(cases),
    )


def _key(question: Question) -> str:
    choices = "\n".join(question.reference.choices)
    return hashlib.sha256(f"{question.key}\n{choices}".encode()).hexdigest()[:24]


def _task_of(rows: Sequence[Record]) -> Task:
    first = rows[0].row
    if "best_incorrect_answer" in first:
        return "binary"
    if all("choices" in row.row for row in rows):
        return "choice"
    answers = [str(text) for row in rows for text in row.row.get("answers") or ()]
    return "number" if answers and all(map(_NUMBER.fullmatch, answers)) else "open"


def _plain(row: dict[str, Any], task: Task) -> dict[str, Any] | None:
    """The row with the fields of its task and no others; None where it is none."""
    plain: dict[str, Any] = {name: row[name] for name in ("id", "question", "messages") if name in row}
    if task == "binary":
        best, worst = row.get("best_answer"), row.get("best_incorrect_answer")
        return {**plain, "choices": [best, worst], "label": 0} if best and worst else None
    if task == "choice":
        choices, label = row.get("choices", row.get("mc1_choices")), row.get("label", row.get("mc1_label"))
        return {**plain, "choices": choices, "label": label} if choices and label is not None else None
    if row.get("answerable") is False:
        return None
    answers = row.get("answers") or row.get("correct_answers")
    wrong = {"incorrect_answers": row["incorrect_answers"]} if row.get("incorrect_answers") else {}
    return {**plain, "answers": answers, **wrong} if answers else None
