"""Wall times of several methods, taken in turns, so that whatever else the machine does meets all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rivals.contention import Contention


@dataclass(slots=True)
class Timings:
    """Seconds of each repeat, last value of each method, and how much of the machine others used meanwhile."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    used_by_others: float = 0.0

    def median(self, name: str) -> float:
        """Median seconds of a method."""
        return statistics.median(self.seconds[name])

    def record(self) -> dict[str, Any]:
        """What goes into the JSON file."""
        medians = {name: self.median(name) for name in self.seconds}
        return {
            "seconds": self.seconds,
            "median_seconds": medians,
            "machine_used_by_others": self.used_by_others,
        }

    def ratio(self, slower: str, faster: str) -> float | None:
        """How many times longer the first takes, by medians; None if either was not measured."""
        if slower not in self.seconds or faster not in self.seconds:
            return None
        return self.median(slower) / self.median(faster)


def interleaved(
    methods: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    before: Mapping[str, Callable[[], Any]] | None = None,
    once: frozenset[str] = frozenset(),
) -> Timings:
    """Each method in turn, ``repeats`` times over, every other time in reverse order.

    Args:
        methods: what to time.
        repeats: how often, at least 1.
        before: what to do before each call of a method, outside its time.
        once: methods that are timed in the first round only.
    """
    timings = Timings()
    contention = Contention()
    for repeat in range(repeats):
        names = [name for name in methods if repeat == 0 or name not in once]
        for name in names if repeat % 2 == 0 else names[::-1]:
            if before and name in before:
                before[name]()
            gc.collect()
            start = time.perf_counter()
            value = methods[name]()
            timings.seconds.setdefault(name, []).append(time.perf_counter() - start)
            timings.values[name] = value
    timings.used_by_others = contention.share()
    return timings
