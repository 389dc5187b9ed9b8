"""The log of scores: one JSON line for each scored answer, as ``gnuq-serve calibrate --data`` reads them.

Rotation is logrotate's: the file is opened anew where it was moved away. Several API server processes write to
one file, each line by one append. No text, unless the operator switched it on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gnuq_serve.service.seeing.observation import Observation

logger = logging.getLogger(__name__)

CAPACITY = 10_000  # lines that wait for a slow disk; more are dropped


def log_row(observation: Observation) -> dict[str, Any]:
    """What is kept of one answer; ``correct`` is for a labeller to fill in."""
    result = observation.result
    row: dict[str, Any] = {
        "id": result["id"],
        "time": datetime.fromtimestamp(observation.ended, UTC).isoformat(timespec="milliseconds"),
        "route": observation.context.route,
        "correct": None,
        "prompt_tokens": observation.prompt_tokens,
        "turns": observation.context.turns,
        "finish_reason": observation.finish_reason,
        "parts": dict(observation.context.parts),
        "uncertainty": dict(result),
    }
    return row


def text_row(observation: Observation) -> dict[str, Any]:
    """Question and answer under the names that ``calibrate`` knows; empty where they are not there as text."""
    text = observation.text
    if text is None or not text.answer:
        return {}
    question = text.question
    if isinstance(question, str):
        return {"question": question, "answer": text.answer} if question.strip() else {}
    if not question or question[-1].get("role") == "assistant":  # an answer that goes on from a given beginning
        return {}
    return {"messages": [dict(turn) for turn in question], "answer": text.answer}


class ScoreLog:
    """Writes lines in a thread of its own; what can't be written is dropped, and said once."""

    def __init__(self, path: Path, *, with_text: bool = False, capacity: int = CAPACITY) -> None:
        """Open the file; where that fails it is tried again with each line.

        Args:
            path: the file; appended to, made for its owner alone where it is not there.
            with_text: question and answer stand in it too.
            capacity: lines that may wait.
        """
        self.path = path
        self._with_text = with_text
        self._lines: queue.Queue[bytes | None] = queue.Queue(capacity)
        self._file: int | None = None
        self._complained: set[str] = set()
        self._torn = False
        self._thread = threading.Thread(target=self._write_all, name="gnuq-score-log", daemon=True)
        self._thread.start()

    def observe(self, observation: Observation) -> None:
        """Log one answer if it is scored; an observer of the service."""
        if observation.result["status"] != "scored":
            return
        row = log_row(observation)
        if self._with_text:
            row |= text_row(observation)
        self.write(row)

    def write(self, row: Mapping[str, Any]) -> None:
        """Log one row; never waits."""
        try:
            self._lines.put_nowait(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        except queue.Full:
            self._complain("full", "score_log=%s is too slow: lines are dropped", self.path)

    def close(self, timeout: float = 5.0) -> None:
        """Write what waits, for at most ``timeout`` seconds; a second time is nothing."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=timeout)
        self._thread.join(timeout)

    def _write_all(self) -> None:
        try:
            self._opened()  # a wrong path is told at the start
        except OSError as error:
            self._complain("disk", "score_log=%s can't be written, lines are lost: %s", self.path, error)
        while (line := self._lines.get()) is not None:
            try:
                self._append(line)
                self._complained.discard("disk")
            except OSError as error:
                self._complain("disk", "score_log=%s can't be written, lines are lost: %s", self.path, error)
        self._close()

    def _append(self, line: bytes) -> None:
        file = self._opened()
        if self._torn:  # what was cut off must not spoil this line too
            line = b"\n" + line
        self._torn = os.write(file, line) < len(line)
        if self._torn:
            raise OSError("the disk is full")

    def _opened(self) -> int:
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file), self.path.stat()):
                    return self._file
            self._close()
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _complain(self, what: str, message: str, *arguments: object) -> None:
        if what not in self._complained:
            self._complained.add(what)
            logger.error(message, *arguments)
