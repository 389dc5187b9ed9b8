"""The working file of a calibration: every answer and score as it came, so that a killed run goes on from there.

JSON Lines. The first line holds the settings under which the answers were given; each later one holds an answer,
or a judge's verdict on one. **It holds the text of the answers**: keep it where the data may be kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gnuq_serve.uncertainty import Uncertainty

_VERSION = 1


class WorkingFileError(ValueError):
    """The working file can't be gone on with; the message says why and what to do."""


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


class WorkingFile:
    """Reads what is there, then appends. Use as a context manager."""

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        """Open or start a working file.

        Args:
            path: the file; made if it is not there.
            settings: what answers depend on (server, model, sampling); plain JSON.

        Raises:
            WorkingFileError: no working file, a damaged one, or one made under other settings.
        """
        self.path = Path(path)
        self.answers: dict[str, Answer] = {}
        self.verdicts: dict[tuple[str, str], bool] = {}
        settings = json.loads(json.dumps(settings))
        try:
            started = self._read(settings)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise WorkingFileError(f"{self.path}: {error.strerror}") from error
        if not started:
            self._append({"gnuq_working_file": _VERSION, "settings": settings})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

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

    def _append(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def _read(self, settings: Mapping[str, Any]) -> bool:
        """True where the file has begun; a last line that was cut off when the run was killed is removed."""
        if not self.path.exists():
            return False
        with self.path.open("r+b") as file:
            whole = 0
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self._take(number, json.loads(line), settings)
                except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
                    raise WorkingFileError(
                        f"{self.path}, line {number}: not a line of a working file; name another --working-file"
                    ) from error
                whole += len(line)
            file.seek(0, os.SEEK_END)
            if file.tell() > whole:
                if not whole:  # one line without an end: not ours to cut
                    raise WorkingFileError(
                        f"{self.path}, line 1: not a line of a working file; name another --working-file"
                    )
                file.truncate(whole)
        return whole > 0

    def _take(self, number: int, row: dict[str, Any], settings: Mapping[str, Any]) -> None:
        if number == 1:
            if row["gnuq_working_file"] != _VERSION:
                raise WorkingFileError(f"{self.path} was written by another version; name another --working-file")
            self._compare(row["settings"], settings)
        elif "judge" in row:
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

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changed = [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
        if changed:
            what = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed)
            raise WorkingFileError(
                f"{self.path} was begun under other settings: {what}. Set them back, or name another "
                "--working-file to ask everything again"
            )
