"""Labels of served answers: those marked at random for an audit, and those that somebody volunteered, kept apart.

A marked answer is written down when it is scored, so that its label is taken whenever it comes. Numbers and
labels; text only where the log of scores has it too.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gnuq_serve.service.sqlite_file import SQLiteFile

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    audit INTEGER NOT NULL,
    decision TEXT,
    calibration TEXT,
    max_error REAL,
    body TEXT NOT NULL,
    correct INTEGER,
    volunteered INTEGER,
    labelled REAL
);
"""


class LabelStoreError(RuntimeError):
    """The file can't be used; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledAnswer:
    """One answer that has a label, or waits for it.

    Attributes:
        id: of the answer.
        audit: it was drawn at random; False: somebody volunteered the label.
        decision: what the server decided.
        calibration: id of the calibration behind it.
        max_error: the share of errors that was promised for what is answered; None: nothing was.
        row: as in the log of scores.
        correct: the label; None: none yet.
    """

    id: str
    audit: bool
    decision: str | None
    calibration: str | None
    max_error: float | None
    row: Mapping[str, Any]
    correct: bool | None = None


class LabelStore:
    """Answers and their labels in a SQLite file, which all API server processes share."""

    def __init__(self, path: Path) -> None:
        """The file is opened at first use."""
        self.path = path
        self._file = SQLiteFile(path, _SCHEMA, thread_name="gnuq-labels", durable=True)
        self._complained = False

    def mark(self, answer: LabelledAnswer) -> None:
        """Write down an answer that waits for its label; does not wait for it, and says once if it fails."""
        try:
            self._file.submit(lambda connection: _insert(connection, answer)).add_done_callback(self._note)
        except RuntimeError as error:  # closed
            logger.debug("an answer is not marked: %s", error)

    def label(self, answer_id: str, *, correct: bool, volunteered: bool = False) -> Future[bool | None]:
        """Label an answer that stands there; a later label replaces an earlier one.

        Args:
            answer_id: of its uncertainty.
            correct: the label.
            volunteered: it comes from somebody who chose to give it; on an answer that was drawn it is kept, and
                counts for nothing, since only some give one.

        Returns:
            whether the answer was drawn at random; None where there is no such answer.
        """
        return self._file.submit(
            lambda connection: _label(connection, answer_id, correct=correct, volunteered=volunteered)
        )

    def volunteer(self, answer: LabelledAnswer) -> Future[None]:
        """Write down an answer with a label that nobody asked for."""
        return self._file.submit(lambda connection: _insert(connection, answer))

    def audited(self) -> Future[list[LabelledAnswer]]:
        """The answers drawn at random, in the order in which they were, without what stands in the log."""
        return self._file.submit(lambda connection: _read(connection, "WHERE audit", with_rows=False))

    def close(self) -> None:
        """Close the file once all is written."""
        self._file.close()

    def _note(self, done: Future[None]) -> None:
        if (error := done.exception()) is not None and not self._complained:
            self._complained = True
            logger.error("labels_path=%s can't be written, audits are incomplete: %s", self.path, error)


def read_labels(path: Path) -> list[LabelledAnswer]:
    """All answers of a file that have a label, for another process than the server.

    Raises:
        LabelStoreError: there is no such file, or it is another kind of file.
    """
    if not path.is_file():
        raise LabelStoreError(
            f"{path}: no such file; the server writes it where audit_fraction or feedback is on"
        )
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            return _read(connection, "WHERE correct IS NOT NULL", with_rows=True)
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise LabelStoreError(f"{path}: not a file of labels ({error})") from error


def _insert(connection: sqlite3.Connection, answer: LabelledAnswer) -> None:
    labelled = None if answer.correct is None else time.time()
    connection.execute(
        "INSERT INTO answers (id, audit, decision, calibration, max_error, body, correct, labelled) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (id) DO NOTHING",
        (
            answer.id,
            answer.audit,
            answer.decision,
            answer.calibration,
            answer.max_error,
            json.dumps(answer.row, allow_nan=False),
            answer.correct,
            labelled,
        ),
    )


def _label(connection: sqlite3.Connection, answer_id: str, *, correct: bool, volunteered: bool) -> bool | None:
    found = connection.execute(
        "UPDATE answers SET correct = CASE WHEN audit AND :volunteered THEN correct ELSE :correct END, "
        "volunteered = CASE WHEN :volunteered THEN :correct ELSE volunteered END, labelled = :now "
        "WHERE id = :id RETURNING audit",
        {"id": answer_id, "correct": correct, "volunteered": volunteered, "now": time.time()},
    ).fetchone()
    return None if found is None else bool(found[0])


def _read(connection: sqlite3.Connection, which: str, *, with_rows: bool) -> list[LabelledAnswer]:
    body = "body" if with_rows else "'{}'"
    rows = connection.execute(
        f"SELECT id, audit, decision, calibration, max_error, {body}, correct "  # noqa: S608
        f"FROM answers {which} ORDER BY number"
    )
    return [
        LabelledAnswer(
            id=answer_id,
            audit=bool(audit),
            decision=decision,
            calibration=calibration,
            max_error=max_error,
            row=json.loads(row),
            correct=None if correct is None else bool(correct),
        )
        for answer_id, audit, decision, calibration, max_error, row, correct in rows
    ]
