"""The user's labelled questions: JSON Lines or CSV in, one `Question` for each row out.

A row is one of

* a question to ask: ``question`` (or ``messages``) and ``answers``, or ``choices`` and ``label``;
* an answer that was given: ``question``, ``answer`` and ``correct`` (or references to compare it with);
* an answer that was scored: ``uncertainty`` and ``correct``, as a server's log has them. No model is asked.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gnuq_serve.calibration.row_reader import LETTERS, DataError, Record, read_rows
from gnuq_serve.matching import Reference
from gnuq_serve.uncertainty import Uncertainty

CHOICE_PROMPT = "{question}\n\n{choices}\n\nAnswer with the letter of the right choice."


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One row of the data.

    Attributes:
        key: digest of what the model is asked and of the given answer: equal keys, equal work.
        path: the row's file.
        line: where the row stands in it; the first line is 1.
        messages: the chat to answer; empty: the row is scored already and names no question.
        reference: what a right answer is; choices stand in the order in which they are shown.
        answer: the answer that was given; None: the model is to answer.
        correct: the user's own label; None: the matcher says, or nothing does (see `labelled`).
        uncertainty: the score, where the row brings one.
        group: rows with the same group are split together; None: a group of its own.
        extra: the row's other columns.
    """

    key: str
    path: Path
    line: int
    messages: tuple[dict[str, Any], ...] = ()
    reference: Reference = field(default_factory=Reference)
    answer: str | None = None
    correct: bool | None = None
    uncertainty: Uncertainty | None = None
    group: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def labelled(self) -> bool:
        """Something says whether the answer is right; only a row of a log may lack it."""
        return self.correct is not None or bool(self.reference.answers)

    @property
    def text(self) -> str:
        """What the user asked last; empty where the row names no question."""
        return self.reference.question


def read_questions(
    path: str | Path,
    *,
    group: str | None = None,
    seed: int = 0,
    system: str | None = None,
    choice_prompt: str = CHOICE_PROMPT,
    show_choices: bool = True,
) -> list[Question]:
    """Read a file of questions.

    Args:
        path: a JSON Lines file, or CSV with a header row if its name ends in ``.csv``. In CSV, ``answers`` and
            ``choices`` hold a JSON list, or texts parted by ``|``.
        group: column that says which rows belong together.
        seed: with the row's own content, decides the order in which its choices are shown: many files name the
            right choice first.
        system: system prompt, put before every question that has none.
        choice_prompt: how a question with choices is put; ``{question}`` and ``{choices}`` are filled in.
        show_choices: False: ask the bare question, whatever choices a row has.

    Raises:
        DataError: no such file, no rows, or a row that can't be used.
    """
    path = Path(path)
    questions = questions_of(
        read_rows(path),
        group=group,
        seed=seed,
        system=system,
        choice_prompt=choice_prompt,
        show_choices=show_choices,
    )
    if not questions:
        raise DataError(f"{path}: no rows")
    return questions


def questions_of(
    rows: Iterable[Record],
    *,
    group: str | None = None,
    seed: int = 0,
    system: str | None = None,
    choice_prompt: str = CHOICE_PROMPT,
    show_choices: bool = True,
) -> list[Question]:
    """One question for each row; arguments and errors as of `read_questions`."""
    questions = []
    for row in rows:
        if group is not None and group not in row.row:
            row.fail(group, f"is missing; --group names it; columns here: {', '.join(row.row)}")
        questions.append(_question(row, group, seed, system, choice_prompt, show_choices))
    return questions


def _question(
    row: Record, group: str | None, seed: int, system: str | None, choice_prompt: str, show_choices: bool
) -> Question:
    messages, question = row.messages(), row.text("question")
    given, correct, uncertainty = row.text("answer"), row.boolean("correct"), row.uncertainty()
    answers = row.texts("answers", "references", "reference")
    choices = row.texts("choices")
    label = row.label(choices)
    if choices:
        if not 2 <= len(choices) <= len(LETTERS):
            row.fail("choices", f"holds {len(choices)} texts; between 2 and {len(LETTERS)} can be lettered")
        if label is None and len(right := [at for at, text in enumerate(choices) if text in answers]) == 1:
            label = right[0]
        if label is None and uncertainty is None and correct is None:
            row.fail("label", "is missing: it says which of `choices` is right, counted from 0")
    if question is None and not messages and uncertainty is None:
        row.fail("question", "is missing; give the text of the question (or `messages`, or `uncertainty`)")
    if question is not None and not question.strip():
        row.fail("question", "is empty")
    unlabelled = uncertainty is not None and correct is None and (given is None or not (answers or choices))
    if unlabelled and "correct" not in row.row:
        row.fail("correct", "is missing: a scored row needs it (null: not labelled), or `answer` and `answers`")
    if uncertainty is None and correct is not None and given is None:
        row.fail("answer", "is missing: `correct` labels an answer, so give the answer that it labels")
    if correct is None and not answers and not choices and not unlabelled:
        hint = "; name reference answers `answers`" if given is not None else ""
        row.fail("answers", f"is missing: right answers to compare with, or `choices` and `label`{hint}")
    text = question or next((_plain(m.get("content")) for m in reversed(messages) if m["role"] == "user"), "")
    if label is not None and not answers:
        answers = (choices[label],)
    # An answer that was given saw the choices in the file's order, if it saw them.
    ask = given is None and uncertainty is None
    if ask and choices and show_choices and not messages:
        choices, label = _shuffled(choices, label, f"{seed}:{text}:{choices}")
        question = choice_prompt.format(question=question, choices=_lettered(choices))
    if not messages and question is not None:
        messages = ({"role": "user", "content": question},)
    if system is not None and messages and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    known = {"question", "messages", "answer", "correct", "uncertainty", "answers", "references", "reference"}
    known |= {"choices", "label"}
    content = json.dumps([messages, given], ensure_ascii=False, sort_keys=True)
    return Question(
        key=hashlib.sha256(content.encode()).hexdigest()[:24],
        path=row.path,
        line=row.line,
        messages=messages,
        reference=Reference(answers=answers, choices=choices, label=label, question=text),
        answer=given,
        correct=correct,
        uncertainty=uncertainty,
        group=None if group is None or row.row[group] is None else str(row.row[group]),
        extra={name: value for name, value in row.row.items() if name not in known},
    )


def _shuffled(choices: tuple[str, ...], label: int | None, seed: str) -> tuple[tuple[str, ...], int | None]:
    order = list(range(len(choices)))
    random.Random(seed).shuffle(order)  # noqa: S311
    return tuple(choices[at] for at in order), None if label is None else order.index(label)


def _lettered(choices: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))


def _plain(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
