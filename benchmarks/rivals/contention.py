"""How much of the machine others used meanwhile: torch's threads wait for each other, so a little costs much."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import psutil

TOLERATED = 0.05
_EVERY = 1.0  # seconds between two looks at our processes


class Contention:
    """Counts from when it is made to when it is asked for its share, once. Linux only.

    A server's engine outlives the process that started it by a moment: nobody waits for it, and its time is never
    added to ours. So we look at all that descend from us while they run.
    """

    def __init__(self) -> None:
        self._ours: dict[int, float] = {}
        self._look()
        self._before = dict(self._ours)
        self._start = time.perf_counter(), _busy()
        self._asked = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def share(self) -> float:
        """Processor time that other processes have used since, as a share of all that the machine has."""
        self._asked.set()
        self._look()
        own = sum(seconds - self._before.get(pid, 0.0) for pid, seconds in self._ours.items())
        began, busy = self._start
        return max(0.0, (_busy() - busy - own) / ((time.perf_counter() - began) * (os.cpu_count() or 1)))

    def _watch(self) -> None:
        while not self._asked.wait(_EVERY):
            self._look()

    def _look(self) -> None:
        me = psutil.Process()
        for process in (me, *me.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue  # it has ended
            self._ours[process.pid] = times.user + times.system


def _busy() -> float:
    """Processor seconds that all have used since the machine started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:]]
    idle = fields[3] + fields[4]  # idle, and waiting for a disk
    return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")
