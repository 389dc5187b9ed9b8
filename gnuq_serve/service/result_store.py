"""Results by id in a small SQLite file, for every API server process and through restarts of the scorer.

It holds numbers, reasons and warnings; never a prompt or an answer.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from gnuq_serve.service.private_folder import PrivateFolderError, private_file
from gnuq_serve.service.sqlite_file import SQLiteFile

_T = TypeVar("_T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS results (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    created REAL NOT NULL,
    pending_until REAL,
    body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS results_created ON results (created);
"""


class ResultStoreError(RuntimeError):
    """The file can't be used; the message names it."""


class ResultStore:
    """Keeps the newest results for a time. Its methods run in a thread of their own, not on the event loop."""

    def __init__(
        self, path: Path, *, keep: int, keep_seconds: float, clock: Callable[[], float] = time.time
    ) -> None:
        """Prepare; the file is opened at first use.

        Args:
            path: the SQLite file.
            keep: how many results are kept, the newest ones.
            keep_seconds: for how long each is kept.
            clock: seconds since the epoch.
        """
        self.path = path
        self._keep, self._keep_seconds, self._clock = keep, keep_seconds, clock
        # Losing the last results with the machine is no loss; waiting for its disk would be one.
        self._file = SQLiteFile(path, _SCHEMA, thread_name="gnuq-results", durable=False)

    async def put(self, result: Mapping[str, Any], *, pending_seconds: float | None = None) -> None:
        """Keep a result under its ``id``; an earlier one of that id is replaced.

        Args:
            result: an uncertainty in JSON form.
            pending_seconds: it is pending, and will not come any more after this time.

        Raises:
            ResultStoreError: the file can't be written.
        """
        body = json.dumps(result, allow_nan=False)
        await self._run(lambda connection: self._put(connection, result["id"], body, pending_seconds))

    async def get(self, result_id: str) -> dict[str, Any] | None:
        """The result of an id in JSON form; None for an unknown or forgotten one.

        Raises:
            ResultStoreError: the file can't be read.
        """
        return await self._run(lambda connection: self._get(connection, result_id))

    def close(self) -> None:
        """Close the file once all writes are done; a second time is nothing."""
        self._file.close()

    async def _run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        try:
            return await asyncio.wrap_future(self._file.submit(work))
        except (sqlite3.Error, OSError, RuntimeError) as error:  # RuntimeError: closed already
            raise ResultStoreError(f"results_path={self.path} can't be used: {error}") from error

    def _put(
        self, connection: sqlite3.Connection, result_id: str, body: str, pending_seconds: float | None
    ) -> None:
        now = self._clock()
        pending_until = None if pending_seconds is None else now + pending_seconds
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.execute(
                "INSERT INTO results (id, created, pending_until, body) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET pending_until = excluded.pending_until, body = excluded.body",
                (result_id, now, pending_until, body),
            )
            connection.execute("DELETE FROM results WHERE created < ?", (now - self._keep_seconds,))
            connection.execute(
                "DELETE FROM results WHERE number <= (SELECT MAX(number) FROM results) - ?", (self._keep,)
            )
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    def _get(self, connection: sqlite3.Connection, result_id: str) -> dict[str, Any] | None:
        now = self._clock()
        row = connection.execute(
            "SELECT pending_until, body FROM results WHERE id = ? AND created >= ?",
            (result_id, now - self._keep_seconds),
        ).fetchone()
        if row is None:
            return None
        pending_until, body = row
        result: dict[str, Any] = json.loads(body)
        if pending_until is not None and pending_until < now:
            # Whoever was to write it is gone.
            result |= {"status": "failed", "reason": "the server process that held this answer ended"}
        return result


def default_path(server: str) -> Path:
    """A file for one server, the same for all its processes, in a folder that only this user can enter.

    Args:
        server: what tells this server from others of the machine, such as its address.

    Raises:
        ResultStoreError: the folder is somebody else's.
    """
    try:
        return private_file("results", server, ".sqlite")
    except PrivateFolderError as error:
        raise ResultStoreError(f"{error}: name another file in results_path") from error
