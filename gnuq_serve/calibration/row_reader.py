"""Rows of a JSON Lines or CSV file, with typed access to fields; errors name file, line, field and remedy."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gnuq_serve.uncertainty import Uncertainty

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TRUE, _FALSE = ("true", "1", "yes", "right", "correct"), ("false", "0", "no", "wrong", "incorrect")


class DataError(ValueError):
    """A row of the data can't be used; the message names file, line, field and remedy."""


def read_rows(path: Path) -> Iterator[Record]:
    """The rows of a file: CSV with a header if its name ends in ``.csv``, else JSON Lines.

    Raises:
        DataError: the file can't be read, or a line is neither.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            read = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
            for line, row in read(path, file):
                yield Record(path, line, row)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            hint = "; one JSON object a line is expected" + (
                ", not one big array" if line.startswith("[") else ""
            )
            raise DataError(f"{path}, line {number}: not JSON ({error.msg}){hint}") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: one JSON object a line is expected, not {type(row).__name__}"
            )
        yield number, row


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    # Answers and uncertainties are long; the csv module stops at 128 kB.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(lines, strict=True)
    while True:
        start = 1
        try:
            _ = reader.fieldnames  # reads the header
            start = reader.line_num + 1
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}, line {start}: not CSV ({error}); quote texts with commas or quotes"
            ) from error
        if None in row:
            raise DataError(
                f"{path}, line {start}: more cells than the header has columns; quote texts with commas"
            )
        yield start, {name: cell for name, cell in row.items() if cell not in (None, "")}


class Record:
    """One row of a file, with typed access to its fields; every error names file, line and field."""

    def __init__(self, path: Path, line: int, row: dict[str, Any]) -> None:
        self.path, self.line, self.row = path, line, row
        self.csv = path.suffix.lower() == ".csv"

    def fail(self, field: str, what: str) -> NoReturn:
        """Raise the error for one field."""
        raise DataError(f"{self.path}, line {self.line}: `{field}` {what}")

    def text(self, field: str) -> str | None:
        """A text, or None where the field is not there."""
        value = self.row.get(field)
        if value is None:
            return None
        if not isinstance(value, str):
            self.fail(field, f"must be a text, not {value!r:.60}")
        return value

    def texts(self, *fields: str) -> tuple[str, ...]:
        """The first of the fields that is there, as a list of texts; a lone text or number is a list of one."""
        for field in fields:
            value = self.row.get(field)
            if value is None:
                continue
            if self.csv and isinstance(value, str):
                value = self._json(field, value) if value.startswith("[") else value.split("|")
            if isinstance(value, str | int | float) and not isinstance(value, bool):
                value = [value]
            if not isinstance(value, list) or not all(
                isinstance(item, str | int | float) and not isinstance(item, bool) for item in value
            ):
                self.fail(field, f"must be a text or a list of texts, not {value!r:.60}")
            return tuple(text for item in value if (text := str(item).strip()))
        return ()

    def boolean(self, field: str) -> bool | None:
        """True or false, also as 1/0, yes/no, right/wrong."""
        value = self.row.get(field)
        if value is None:
            return None
        word = str(value).strip().lower()
        if word not in _TRUE + _FALSE:
            self.fail(field, f"must be true or false, not {value!r:.60}")
        return word in _TRUE

    def label(self, choices: Sequence[str]) -> int | None:
        """The index of the right choice, from an index or a letter."""
        value = self.row.get("label")
        if value is None:
            return None
        text = str(value).strip()
        if text.isdigit():
            index = int(text)
        elif len(text) == 1 and text.upper() in LETTERS:
            index = LETTERS.index(text.upper())
        else:
            self.fail("label", f"must be the index of the right choice from 0, or its letter, not {value!r:.60}")
        if index >= len(choices):
            self.fail("label", f"is {value!r}, but there are {len(choices)} choices; indices start at 0")
        return index

    def messages(self) -> tuple[dict[str, Any], ...]:
        """A chat that ends with a turn to answer."""
        value = self.row.get("messages")
        if self.csv and isinstance(value, str):
            value = self._json("messages", value)
        if value is None:
            return ()
        if (
            not isinstance(value, list)
            or not value
            or not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in value)
        ):
            self.fail("messages", 'must be a list of {"role": …, "content": …}')
        if value[-1]["role"] == "assistant":
            self.fail("messages", "ends with the assistant's turn; put that into `answer`")
        return tuple(value)

    def uncertainty(self) -> Uncertainty | None:
        """The `uncertainty` object of a response."""
        value = self.row.get("uncertainty")
        if value is None:
            return None
        if self.csv and isinstance(value, str):
            value = self._json("uncertainty", value)
        if not isinstance(value, dict):
            self.fail("uncertainty", "must be the object of a response's choice")
        try:
            return Uncertainty.from_dict(value)
        except ValueError as error:
            self.fail("uncertainty", str(error))

    def _json(self, field: str, text: str) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            self.fail(field, f"is not JSON ({error.msg})")
