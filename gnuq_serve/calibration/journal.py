"""A file of finished work, JSON Lines: a run that was killed goes on from what it holds.

The first line holds the settings that all later lines depend on; each later one is a piece of finished work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class WorkingFileError(ValueError):
    """The working file can't be gone on with; the message says why and what to do."""


class Journal:
    """Reads what is there, then appends. Use as a context manager; a subclass says what its lines mean."""

    kind = "gnuq_working_file"
    version = 1
    another = "name another --working-file"

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        """Open or start a file.

        Args:
            path: the file; made if it is not there.
            settings: what its lines depend on (server, model, sampling); plain JSON.

        Raises:
            WorkingFileError: no working file, a damaged one, or one made under other settings.
        """
        self.path = Path(path)
        settings = json.loads(json.dumps(settings))
        try:
            started = self._read(settings)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise WorkingFileError(f"{self.path}: {error.strerror}") from error
        if not started:
            self._append({self.kind: self.version, "settings": settings})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _take_row(self, row: dict[str, Any]) -> None:
        """Remember one line of finished work; KeyError, TypeError and AttributeError mean that it is none."""
        raise NotImplementedError

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
                        f"{self.path}, line {number}: not a line of a working file; {self.another}"
                    ) from error
                whole += len(line)
            file.seek(0, os.SEEK_END)
            if file.tell() > whole:
                if not whole:  # one line without an end: not ours to cut
                    raise WorkingFileError(f"{self.path}, line 1: not a line of a working file; {self.another}")
                file.truncate(whole)
        return whole > 0

    def _take(self, number: int, row: dict[str, Any], settings: Mapping[str, Any]) -> None:
        if number > 1:
            self._take_row(row)
            return
        if row[self.kind] != self.version:
            raise WorkingFileError(f"{self.path} was written by another version; {self.another}")
        self._compare(row["settings"], settings)

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changed = [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
        if changed:
            what = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed)
            raise WorkingFileError(
                f"{self.path} was begun under other settings: {what}. Set them back, or {self.another} to ask "
                "everything again"
            )
