"""The working file of a calibration: every answer and score as it came, so that a killed run goes on from there.

JSON Lines. The first line holds the settings under which the answers were given; each later one holds an answer,
or a judge's verdict on one. **It holds the text of the answers**: keep it where the data may be kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnuq_serve.calibration.journal import Journal
from gnuq_serve.calibration.journal import WorkingFileError as WorkingFileError
from gnuq_serve.uncertainty import Uncertainty


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back for one question.

    Attributes:
        key: the question's key.
        text: the answer.
        uncertainty: its score; ``status`` says whether there is one.
        finish_reason: why the answer ended.
        prompt_tokens: tokens of the prompt, template included.
        failure: why there is no answer at all.
    """

    key: str
    text: str = ""
    uncertainty: Uncertainty | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    failure: str | None = None

    @property
    def scored(self) -> bool:
        """There is an answer, and a score for it."""
        return self.failure is None and self.uncertainty is not None and self.uncertainty.status == "scored"

    @property
    def score(self) -> Uncertainty:
        """The score of an answer that has one.

        Raises:
            ValueError: it has none.
        """
        if self.uncertainty is None:
            raise ValueError(f"no score for {self.key}")
        return self.uncertainty


class WorkingFile(Journal):
    """Reads what is there, then appends. Use as a context manager."""

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        """Open or start a working file; arguments and errors as of `Journal`."""
        self.answers: dict[str, Answer] = {}
        self.verdicts: dict[tuple[str, str], bool] = {}
        super().__init__(path, settings)

    def add(self, answer: Answer) -> None:
        """Keep one answer."""
        self._take_answer(answer)
        row: dict[str, Any] = {"key": answer.key}
        if answer.failure is not None:
            row["failure"] = answer.failure
        else:
            row |= {
                "answer": answer.text,
                "finish_reason": answer.finish_reason,
                "prompt_tokens": answer.prompt_tokens,
                "uncertainty": answer.uncertainty.to_dict() if answer.uncertainty else None,
            }
        self._append(row)

    def add_verdict(self, key: str, judge: str, correct: bool) -> None:
        """Keep a judge's verdict on the answer with this key."""
        self.verdicts[key, judge] = correct
        self._append({"key": key, "judge": judge, "correct": correct})

    def _take_row(self, row: dict[str, Any]) -> None:
        if "judge" in row:
            self.verdicts[row["key"], row["judge"]] = bool(row["correct"])
        else:
            score = row.get("uncertainty")
            self._take_answer(
                Answer(
                    key=row["key"],
                    text=row.get("answer") or "",
                    uncertainty=None if score is None else Uncertainty.from_dict(score),
                    finish_reason=row.get("finish_reason"),
                    prompt_tokens=row.get("prompt_tokens"),
                    failure=row.get("failure"),
                )
            )

    def _take_answer(self, answer: Answer) -> None:
        if answer.key in self.answers:  # asked again; a verdict on the old answer says nothing of the new one
            self.verdicts = {at: verdict for at, verdict in self.verdicts.items() if at[0] != answer.key}
        self.answers[answer.key] = answer
