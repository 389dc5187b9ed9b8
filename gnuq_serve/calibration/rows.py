"""What a calibration is made of: scored answers that somebody or something has marked right or wrong."""

from __future__ import annotations

from dataclasses import dataclass

from gnuq_serve.uncertainty import Uncertainty


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One answer: its uncertainty, and whether it was right.

    Args:
        uncertainty: the score, as served; rows with another ``status`` than ``scored`` are left out and counted.
        correct: whether the answer was right.
        group: rows of one conversation, or paraphrases of one question, share a name and are never split; None:
            a row of its own.
        prompt_tokens: length of the prompt in tokens.
        turns: messages of the user in the prompt.
        finish_reason: why the answer ended (``stop``, ``length``).
        fit_only: it may be fitted on, and says nothing about the promise: it was not drawn like the questions
            that this is about (rows of an earlier calibration, say).
        key: names the row where results point back to it (line number, question id); no text of the question.
    """

    uncertainty: Uncertainty
    correct: bool
    group: str | None = None
    prompt_tokens: int | None = None
    turns: int | None = None
    finish_reason: str | None = None
    key: str | None = None
    fit_only: bool = False
