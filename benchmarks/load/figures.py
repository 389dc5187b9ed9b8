"""Small statistics."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from load.client import Reply


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The nearest-rank percentile; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def ratio_interval(above: Sequence[float], below: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """A 95 % bootstrap interval of the ratio of medians."""
    generator = random.Random(seed)

    def resampled(values: Sequence[float]) -> float:
        return statistics.median(generator.choices(values, k=len(values)))

    ratios = sorted(resampled(above) / resampled(below) for _ in range(2000))
    return ratios[50], ratios[1949]


def statuses(replies: Iterable[Reply]) -> dict[str, int]:
    """How many uncertainties of each status, those without a score by reason."""
    found = Counter(
        one["status"] if one["status"] == "scored" else f"{one['status']}: {one['reason']}"
        for reply in replies
        for one in reply.uncertainties
    )
    return dict(found.most_common())
