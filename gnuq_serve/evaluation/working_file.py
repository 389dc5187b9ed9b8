"""The working file of an evaluation: each step of each question as it was done. It holds texts of answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gnuq_serve.calibration.journal import Journal

Results = dict[tuple[str, str], dict[str, dict[str, Any]]]  # by set and question, then by step


def read_results(path: str | Path) -> Results:
    """What a file holds that is not gone on with.

    Raises:
        OSError: it can't be read.
        ValueError, KeyError: a line of it is none of an evaluation.
    """
    results: Results = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines()[1:]:
        row = json.loads(line)
        if "note" not in row:
            _take_result(results, row)
    return results


def _take_result(results: Results, row: Mapping[str, Any]) -> None:
    """A new answer takes the place of the old one and of all that was said about it."""
    steps = results.setdefault((row["set"], row["key"]), {})
    if row["step"] == "answer":
        steps.clear()
    steps[row["step"]] = dict(row["result"])


class EvaluationFile(Journal):
    """Results by set, question and step. Use as a context manager."""

    kind = "gnuq_evaluation"
    another = "name another --out"

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        """Open or start a file; arguments and errors as of `Journal`."""
        self._results: Results = {}
        self.notes: dict[str, Any] = {}
        super().__init__(path, settings)

    def of(self, set_name: str, key: str) -> dict[str, dict[str, Any]]:
        """Results of one question, by step."""
        return self._results.setdefault((set_name, key), {})

    def add(self, set_name: str, key: str, step: str, result: Mapping[str, Any]) -> None:
        """Keep a result; a new answer also ends all that was said about the old one."""
        row = {"set": set_name, "key": key, "step": step, "result": dict(result)}
        self._take_row(row)
        self._append(row)

    def note(self, name: str, value: Any) -> None:
        """Keep a fact about the whole run."""
        self.notes[name] = value
        self._append({"note": name, "value": value})

    def _take_row(self, row: dict[str, Any]) -> None:
        if "note" in row:
            self.notes[row["note"]] = row["value"]
        else:
            _take_result(self._results, row)
