"""Rows of well-known data sets in the fields of our question sets; recognised by their shape, not by a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

RULES = (
    "answer (a text, a number, a list; a text with #### and the number behind it)",
    "answer {value, aliases}",
    "answers (a list)",
    "answers {text}",
    "choices and label",
    "choices and a whole number as answer",
    "choices {text, label} and answerKey",
    "mc1_targets {choices, labels}",
    "correct_answers, with or without incorrect_answers",
    "best_answer and best_incorrect_answer",
)
_OURS = (
    "best_answer",
    "best_incorrect_answer",
    "correct_answers",
    "incorrect_answers",
    "mc1_choices",
    "mc1_label",
)
COLUMNS = ("question", "answer", "answers", "answerable", "choices", "label", "answerKey", "mc1_targets", *_OURS)
# Stands in TriviaQA's test split for an answer that is kept back.
_KEPT_BACK = "<unk>"


def in_our_fields(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row as files of questions have it; None where it has no text ``question`` or none of the `RULES` fits.

    Where the answer is kept back, as in many test splits, `has_answer` is false of it.
    """
    if not isinstance(row.get("question"), str):
        return None
    for rule in (_choices, _ours, _answers, _answer):
        if (fields := rule(row)) is not None:
            return {"question": row["question"], **fields}
    return None


def has_answer(fields: Mapping[str, Any]) -> bool:
    """Something in the row says what is right."""
    texts, labels = ("answers", "correct_answers", "best_answer"), ("label", "mc1_label")
    return any(fields.get(name) for name in texts) or any(fields.get(name) is not None for name in labels)


def _choices(row: Mapping[str, Any]) -> dict[str, Any] | None:
    choices, answer, targets = row.get("choices"), row.get("answer"), row.get("mc1_targets")
    if _holds(choices, "text", "label") and "answerKey" in row:  # ARC, CommonsenseQA
        return {"choices": choices["text"], "label": _index(choices["label"], row["answerKey"])}
    if _holds(targets, "choices", "labels"):  # TruthfulQA's multiple choice
        return {"choices": targets["choices"], "label": _index(targets["labels"], 1)}
    if not isinstance(choices, list):
        return None
    if isinstance(answer, int) and not isinstance(answer, bool):  # MMLU
        return {"choices": choices, "label": answer if answer >= 0 else None}
    if "label" in row:
        label = None if row["label"] in (-1, "") else row["label"]
        return {"choices": choices, "label": label, **(_answers(row) or {})}
    return None


def _ours(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """TruthfulQA's other forms are ours already."""
    fields = {name: row[name] for name in _OURS if row.get(name) is not None}
    return fields if {"correct_answers", "best_incorrect_answer", "mc1_choices"} & set(fields) else None


def _answers(row: Mapping[str, Any]) -> dict[str, Any] | None:
    answer, answers = row.get("answer"), row.get("answers")
    if _holds(answer, "value"):  # TriviaQA
        return {"answers": _texts([answer["value"], *(answer.get("aliases") or ())])}
    if _holds(answers, "text"):  # SQuAD; an empty list where the passage has no answer
        return {"answers": _texts(answers["text"])}
    for listed in (answers, answer):
        if isinstance(listed, list) and not any(isinstance(one, Mapping | list) for one in listed):
            return {"answers": [] if row.get("answerable") is False else _texts(listed)}
    return None


def _answer(row: Mapping[str, Any]) -> dict[str, Any] | None:
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    if isinstance(answer, str) and "####" in answer:  # GSM8K: the working, then the number
        answer = answer.rpartition("####")[2].replace(",", "")
    return {"answers": _texts([answer])}


def _holds(value: Any, *names: str) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping) and all(name in value for name in names)


def _index(values: Iterable[Any], wanted: Any) -> int | None:
    return next((at for at, value in enumerate(values) if value == wanted), None)


def _texts(values: Iterable[Any]) -> list[str]:
    texts = (str(value).strip() for value in values if value is not None)
    return list(dict.fromkeys(text for text in texts if text and text != _KEPT_BACK))
