"""What an operator changes while the server runs: whether it scores, and when it reads its settings again.

It stands in a small file that all API server processes of one server look at, at each request: a change holds
from the next request on, whichever process takes it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from pathlib import Path

import msgspec

from gnuq_serve.service.private_folder import PrivateFolderError, private_file

logger = logging.getLogger(__name__)


class ControlError(RuntimeError):
    """The file can't be written; the message names it."""


class ControlState(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator last said.

    Attributes:
        scoring: answers are scored.
        generation: how often settings were to be read again.
        changed: when, in seconds since the epoch; None: nothing was ever changed.
    """

    scoring: bool = True
    generation: int = 0
    changed: float | None = None


class Control:
    """The state of one server, shared by its processes, and kept through its restarts."""

    def __init__(self, path: Path | None) -> None:
        """Nothing is read or written yet.

        Args:
            path: the file; None: this process alone knows its state.
        """
        self._path = path
        self._state = ControlState()
        self._seen: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, server: str) -> Control:
        """The state of a server, told from others of the machine by its name."""
        try:
            return cls(private_file("control", server, ".json"))
        except (OSError, PrivateFolderError) as error:
            logger.error("switch and reload reach one API server process only: %s", error)
            return cls(None)

    @property
    def state(self) -> ControlState:
        """What holds now; a look at the file's times, and at its content where they have changed."""
        if self._path is not None:
            try:
                found = self._path.stat()
                seen = (found.st_mtime_ns, found.st_ino, found.st_size)
                if seen != self._seen:
                    self._state = msgspec.json.decode(self._path.read_bytes(), type=ControlState)
                    self._seen = seen
            except FileNotFoundError:  # cleaned away: what was said still holds
                pass
            except (OSError, msgspec.MsgspecError):
                if self._seen != (0, 0, 0):
                    self._seen = (0, 0, 0)
                    logger.exception("%s can't be read; what was last said still holds", self._path)
        return self._state

    def change(self, *, scoring: bool | None = None, reload: bool = False) -> ControlState:
        """Say something new to all processes.

        Args:
            scoring: whether answers are scored; None: as before.
            reload: settings are to be read again.

        Raises:
            ControlError: the file can't be written; nothing has changed.
        """
        if self._path is None:
            self._state = _after(self._state, scoring, reload=reload)
            return self._state
        try:
            lock = os.open(self._path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)  # two operators at once: neither is lost
                state = _after(self.state, scoring, reload=reload)
                new = self._path.with_suffix(".new")
                new.write_bytes(msgspec.json.encode(state))
                new.replace(self._path)
            finally:
                os.close(lock)
        except OSError as error:
            raise ControlError(f"{self._path} can't be written: {error}") from error
        return self.state


def _after(state: ControlState, scoring: bool | None, *, reload: bool) -> ControlState:
    return ControlState(
        scoring=state.scoring if scoring is None else scoring,
        generation=state.generation + reload,
        changed=time.time(),
    )
