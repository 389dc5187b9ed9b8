"""Why a score can't be had."""

from __future__ import annotations


class ScorerUnavailableError(RuntimeError):
    """No score can be had; the message says why."""


class QueueFullError(ScorerUnavailableError):
    """As many answers as the settings allow wait already."""


class DeadlineError(ScorerUnavailableError):
    """The score did not come in time."""


class ScorerLostError(ScorerUnavailableError):
    """The scorer ended while the answer was in its queue: it may be asked again."""
