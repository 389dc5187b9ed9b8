"""How much of the machine others used meanwhile: torch's threads wait for each other, so a little costs much."""

from __future__ import annotations

import os
import time
from pathlib import Path

TOLERATED = 0.05


class Contention:
    """Starts counting when made. Linux only."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float:
        """Processor time that other processes have used since, as a share of all that the machine has."""
        wall, busy, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, (busy - own) / (wall * (os.cpu_count() or 1)))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:]]
        idle = fields[3] + fields[4]  # idle, and waiting for a disk
        busy = (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return time.perf_counter(), busy, own
