"""One answered, labelled question with everything that was measured on it: what methods read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gnuq_serve.uncertainty import Uncertainty


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One answer.

    Attributes:
        key: the question's.
        line: where it stands in its file.
        task: what kind of question it is.
        question: its text.
        text: the answer.
        correct: whether it is right.
        uncertainty: its score.
        choice_log_probabilities: ``log S`` of each choice, in the order shown; empty: an open question.
        choice: which of them is the answer.
        results: what further steps gave, by their names.
    """

    key: str
    line: int = 0
    task: str = "open"
    question: str = ""
    text: str = ""
    correct: bool = False
    uncertainty: Uncertainty
    choice_log_probabilities: Sequence[float] = ()
    choice: int | None = None
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def result(self, step: str, name: str) -> Any:
        """One entry of what a step gave; None where it was not done."""
        return self.results.get(step, {}).get(name)
