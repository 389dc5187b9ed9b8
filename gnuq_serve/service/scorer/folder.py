"""Where the API server processes of one server meet over its scorer.

One of them leads: it holds a lock on the folder, runs the scorer process and writes down how that is. The others
read it, and connect to the same socket in the folder. The kernel gives the lock back when its holder ends,
however it ends, and then another leads.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
from pathlib import Path

import msgspec

from gnuq_serve.service.private_folder import make_private, private_path
from gnuq_serve.service.scorer.messages import ScorerConfig
from gnuq_serve.service.scorer.shared_state import SharedState

_STATE = "state.json"


class ScorerFolder:
    """The folder of one scorer. The folder itself is what is locked: a lock file could be cleaned away."""

    def __init__(self, path: Path) -> None:
        """Nothing is made yet.

        Args:
            path: where it is, in a folder of this user alone.
        """
        self.path = path
        self._lock: int | None = None

    @classmethod
    def of(cls, server: str | None, config: ScorerConfig) -> ScorerFolder:
        """The folder of a server's scorer; another one for each way of scoring.

        Args:
            server: what tells the server from others of the machine; None: the scorer is shared with nobody.
            config: what the scorer loads and how it scores.
        """
        key = secrets.token_bytes(16) if server is None else server.encode()
        digest = hashlib.sha256(key + msgspec.json.encode(config)).hexdigest()
        return cls(private_path() / f"scorer-{digest[:16]}")

    def lead(self) -> bool:
        """Try to get the lock; true where this process has it.

        Raises:
            PrivateFolderError: the folder is another user's.
            OSError: the folder can't be made.
        """
        if self._lock is None:
            try:
                for folder in (self.path.parent, self.path):
                    make_private(folder)
                self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, FileNotFoundError):  # held, or just removed by its last holder
                self.release()
                return False
        held = self._is_here(self._lock)
        if not held:
            self.release()
        return held

    def abandoned(self) -> bool:
        """Whether nobody leads. Makes nothing, so that a server that ends leaves nothing."""
        try:
            lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(lock)
        return True

    def _is_here(self, lock: int) -> bool:
        """Whether what is locked is the folder of today, not one that was removed and made again."""
        try:
            return os.path.samestat(os.fstat(lock), self.path.stat())
        except FileNotFoundError:
            return False

    @property
    def held(self) -> bool:
        """Whether this process leads, as far as it knows."""
        return self._lock is not None

    def new_endpoint(self) -> str:
        """An address for a scorer process; each start has another, so that none meets its forerunner."""
        return f"ipc://{self.path}/{secrets.token_hex(4)}.sock"

    def write(self, shared: SharedState) -> None:
        """Let the others know; only for the leader.

        Raises:
            FileNotFoundError: the folder was removed; this process leads no more.
        """
        new = self.path / f"{_STATE}.new"
        new.write_bytes(msgspec.json.encode(shared))
        new.replace(self.path / _STATE)

    def read(self) -> SharedState | None:
        """What the leader has written; None where there is nothing."""
        try:
            return msgspec.json.decode((self.path / _STATE).read_bytes(), type=SharedState)
        except (OSError, msgspec.MsgspecError):
            return None

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> bool:
        """Give the lock back and remove the folder, unless another process leads; true where it is gone."""
        with contextlib.suppress(OSError, RuntimeError):
            if self.path.exists() and self.lead():
                for path in self.path.iterdir():
                    path.unlink(missing_ok=True)
                self.path.rmdir()
        self.release()
        return not self.path.exists()
