"""A small SQLite file that several API server processes share, used from one thread of its own."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")

_BUSY_SECONDS = 5.0  # another API server process writes; each of its writes takes less than a millisecond


class SQLiteFile:
    """The file, made for its owner alone at first use, and the thread that works with it."""

    def __init__(self, path: Path, schema: str, *, thread_name: str, durable: bool) -> None:
        """Nothing is opened yet.

        Args:
            path: the file.
            schema: statements that make what is not there yet.
            thread_name: of the thread.
            durable: what is written survives a crash of the machine, at the price of waiting for its disk.
        """
        self.path = path
        self._schema, self._durable = schema, durable
        self._thread = ThreadPoolExecutor(1, thread_name)
        self._connection: sqlite3.Connection | None = None

    def submit(self, work: Callable[[sqlite3.Connection], _T]) -> Future[_T]:
        """Have ``work`` done in the thread, in the order of the calls.

        Raises:
            RuntimeError: the file is closed.
        """
        return self._thread.submit(lambda: work(self._open()))

    def close(self) -> None:
        """Close the file once all work is done; a second time is nothing."""
        with contextlib.suppress(RuntimeError):
            self._thread.submit(self._close)
        self._thread.shutdown()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL, 0o600))
            connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA synchronous={'FULL' if self._durable else 'OFF'}")
            connection.executescript(self._schema)
            self._connection = connection
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
