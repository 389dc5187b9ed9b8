"""The working file of an evaluation: each step of each question as it was done. It holds texts of answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gnuq_serve.calibration.journal import Journal


class EvaluationFile(Journal):
    """Results by set, question and step. Use as a context manager."""

    kind = "gnuq_evaluation"
    another = "name another --out"

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        """Open or start a file; arguments and errors as of `Journal`."""
        self._results: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        self.notes: dict[str, Any] = {}
        super().__init__(path, settings)

    def of(self, set_name: str, key: str) -> dict[str, dict[str, Any]]:
        """Results of one question, by step."""
        return self._results.setdefault((set_name, key), {})

    def add(self, set_name: str, key: str, step: str, result: Mapping[str, Any]) -> None:
        """Keep a result. A new answer takes the place of the old one and of all that was said about it."""
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
            return
        results = self.of(row["set"], row["key"])
        if row["step"] == "answer":
            results.clear()
        results[row["step"]] = dict(row["result"])
