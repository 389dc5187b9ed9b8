"""Which answers are right: the matcher of each task."""

from __future__ import annotations

from collections import Counter

from gnuq_serve.calibration.questions import Question
from gnuq_serve.evaluation.question_sets import Task
from gnuq_serve.matching import get_matcher, normalize


def is_right(task: Task, match: str, question: Question, text: str, choice: int | None) -> bool:
    """Whether an answer is right.

    Args:
        task: a choice is right where it is the label; numbers are compared as numbers.
        match: how an open answer is compared with its references, ``contains`` or ``exact``. A question that
            names incorrect answers too is compared with `closest` whatever this says.
        question: with its references.
        text: the answer.
        choice: the choice that it is.
    """
    if task in ("choice", "binary"):
        return choice == question.reference.label
    if task == "number":
        return get_matcher("number")(text, question.reference)
    if incorrect := question.extra.get("incorrect_answers"):
        return closest(text, question.reference.answers, incorrect)
    return get_matcher(match)(text, question.reference)


def closest(text: str, right: tuple[str, ...], wrong: list[str]) -> bool:
    """The answer's words are more like those of a right answer than like those of any wrong one.

    As TruthfulQA's own BLEU and ROUGE scores decide (arXiv:2109.07958), here by SQuAD's token F1; a draw is
    wrong.
    """
    return max(token_f1(text, one) for one in right) > max(token_f1(text, one) for one in wrong)


def token_f1(text: str, reference: str) -> float:
    """F1 of the words two texts share, in normal form (SQuAD, arXiv:1606.05250)."""
    said, wanted = normalize(text).split(), normalize(reference).split()
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2.0 * shared / (len(said) + len(wanted)) if shared else 0.0
