"""When a scorer process that does not answer is given up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScorerLimits:
    """In seconds.

    Attributes:
        start: from the start to the report that it is ready.
        stuck: without a sign of life; pings are answered by a thread of their own, also during a pass.
        batch: for one batch.
    """

    start: float = 900.0
    stuck: float = 30.0
    batch: float = 600.0
