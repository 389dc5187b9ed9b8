"""What the process that runs the scorer lets the server's other processes know."""

from __future__ import annotations

import msgspec

from gnuq_serve.service.scorer.messages import ScorerState


class SharedState(msgspec.Struct, frozen=True, kw_only=True):
    """How the scorer is, and where.

    Attributes:
        state: how the process is.
        endpoint: where it listens, once it is ready.
        ready_by: when one that is restarted should be ready, on the machine's monotonic clock in seconds; None:
            nobody knows, and nobody should wait for it.
        start_seconds: how long its last start took.
    """

    state: ScorerState
    endpoint: str = ""
    ready_by: float | None = None
    start_seconds: float | None = None
