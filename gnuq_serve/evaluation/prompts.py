"""What the model is asked: as a chat, or, for base models, as a text with examples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gnuq_serve.calibration.row_reader import LETTERS
from gnuq_serve.evaluation.question_sets import Case

Messages = list[dict[str, Any]]

_P_TRUE = "Is the proposed answer true or false? Reply with one word, True or False."
_PERCENT = (
    "How likely is it that the proposed answer is correct? "
    "Reply with a percentage from 0 to 100 and nothing else."
)
TRUE_FALSE = ("True", "False")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, and what stands between it and the answer.

    Attributes:
        content: messages of a chat, or a text.
        lead: what an answer begins with: a space, behind a text that ends with a colon.
        stop: what ends an answer besides the model's own end; empty for a chat.
    """

    content: Messages | str
    lead: str = ""
    stop: str = ""


class Prompter:
    """Makes prompts.

    Args:
        shots: answered examples; none: the questions go as chats.
        letters: an answer to a choice is its letter, not its text.
    """

    def __init__(self, shots: Sequence[Case] = (), *, letters: bool = False) -> None:
        self._letters = letters
        self._shots = [(case.question.messages[-1]["content"], self._right(case)) for case in shots]

    @property
    def chat(self) -> bool:
        """Prompts are chats."""
        return not self._shots

    def answers_of(self, case: Case) -> list[str]:
        """What each choice of a question is as an answer."""
        return [LETTERS[at] if self._letters else text for at, text in enumerate(case.choices)]

    def question(self, case: Case) -> Prompt:
        """The question."""
        if self.chat:
            return Prompt(list(case.question.messages))
        shots = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in self._shots)
        return self._text(f"{self._system(case)}{shots}{self._said(case)}\nAnswer:")

    def p_true(self, case: Case, answer: str) -> Prompt:
        """Is the answer true?"""
        return self._about(case, answer, _P_TRUE, "True or false:", TRUE_FALSE)

    def verbalized(self, case: Case, answer: str) -> Prompt:
        """How likely is it right, in percent?"""
        return self._about(case, answer, _PERCENT, "Probability that it is correct, in percent:", ("95", "5"))

    def _about(self, case: Case, answer: str, asked: str, label: str, words: tuple[str, str]) -> Prompt:
        if self.chat:
            *before, _ = case.question.messages
            content = f"{self._said(case)}\nProposed answer: {answer}\n\n{asked}"
            return Prompt([*before, {"role": "user", "content": content}])
        # Half of the examples show another one's answer, which is false.
        parts = []
        for at, (question, right) in enumerate(self._shots):
            said = right if at % 2 == 0 else self._shots[at - 1][1]
            true = said == right
            parts.append(
                f"Question: {question}\nProposed answer: {said}\n{label} {words[0] if true else words[1]}\n\n"
            )
        return self._text(
            f"{self._system(case)}{''.join(parts)}{self._said(case)}\nProposed answer: {answer}\n{label}"
        )

    def _said(self, case: Case) -> str:
        return f"Question: {case.question.messages[-1]['content']}"

    def _right(self, case: Case) -> str:
        label = case.question.reference.label
        return case.question.reference.answers[0] if label is None else self.answers_of(case)[label]

    def _text(self, text: str) -> Prompt:
        return Prompt(text, lead=" ", stop="\n")

    @staticmethod
    def _system(case: Case) -> str:
        """The system prompt, as the beginning of a text."""
        first = case.question.messages[0]
        return f"{first['content']}\n\n" if first["role"] == "system" else ""


def read_percentage(text: str) -> float | None:
    """The first number of a reply as a share; None where it is none, or beyond 100 %.

    A number with a decimal point that is at most 1 and has no percent sign is a share already.
    """
    found = re.search(r"(\d+(?:\.\d+)?|\.\d+)\s*(%?)", text)
    if found is None:
        return None
    value = float(found[1])
    if "." in found[1] and value <= 1 and not found[2]:
        return value
    return value / 100 if value <= 100 else None
