"""Where answers and their scores come from: a server over HTTP, or a model in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gnuq_serve.calibration.questions import Question
from gnuq_serve.calibration.working_file import Answer

OnAnswer = Callable[[Answer], None]


class AnswerError(RuntimeError):
    """No more answers can be had; the message says why and what to do. What came before is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How answers are generated; a calibration holds for answers generated the same way."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256


class AnswerSource(Protocol):
    """Answers questions and scores answers."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What its answers depend on, as plain JSON."""

    def answer(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        """Answer each question, or score the answer that it brings; in any order, one call for each.

        Raises:
            AnswerError: the source is gone, or its answers carry no score.
        """

    def close(self) -> None:
        """Free what it holds; it answers no more."""
