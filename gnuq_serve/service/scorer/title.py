"""What the scorer process is called by those who look at processes."""

from __future__ import annotations

import psutil

TITLE = "gnuq-serve: scorer"


def scorer_of(server_pid: int) -> psutil.Process | None:
    """The scorer process of a server; None while there is none."""
    try:
        children = psutil.Process(server_pid).children(recursive=True)
    except psutil.Error:
        return None
    for process in children:
        try:
            if TITLE in " ".join(process.cmdline()):
                return process
        except psutil.Error:  # gone meanwhile
            continue
    return None
