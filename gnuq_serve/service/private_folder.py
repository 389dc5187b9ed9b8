"""A folder that only this user can enter, the same for every process of the machine that runs as this user."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path


class PrivateFolderError(RuntimeError):
    """The folder is somebody else's, or open to others; the message names it."""


def private_path() -> Path:
    """Where it is: ``gnuq-serve-UID`` among temporary files."""
    return Path(tempfile.gettempdir()) / f"gnuq-serve-{os.getuid()}"


def private_folder() -> Path:
    """The folder; made where it is not there.

    Raises:
        PrivateFolderError: it belongs to another user, or others may enter it.
        OSError: it can't be made.
    """
    folder = private_path()
    make_private(folder)
    return folder


def private_file(kind: str, server: str, suffix: str) -> Path:
    """A file for one server, the same for all its processes, in that folder.

    Args:
        kind: what the file is for.
        server: what tells this server from others of the machine, such as its address.
        suffix: of its name, with the dot.

    Raises:
        PrivateFolderError: the folder belongs to another user, or others may enter it.
        OSError: it can't be made.
    """
    return private_folder() / f"{kind}-{hashlib.sha256(server.encode()).hexdigest()[:16]}{suffix}"


def make_private(folder: Path) -> None:
    """Make a folder that only this user can enter, where it is not there.

    Raises:
        PrivateFolderError: it is there and belongs to another user, or others may enter it.
        OSError: it can't be made.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PrivateFolderError(f"{folder} is no folder of this user alone")
