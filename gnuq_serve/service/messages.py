"""What the server and the scorer process say to each other (msgspec over ZeroMQ; never pickle)."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from gnuq_serve.score_options import ScoreOptions


class ScorerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the scorer process loads and where it listens; one JSON line on its standard input."""

    endpoint: str = ""  # chosen by whoever starts the process
    model: str
    served_model: str
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 1
    max_batch_tokens: int = 2048
    memory_budget: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    config_overrides: dict[str, Any] = {}


class ScorerState(msgspec.Struct, frozen=True, kw_only=True):
    """How the scorer process is; it prints one such line when it is ready, or when it can't be."""

    status: Literal["starting", "ready", "restarting", "failed", "stopped"]
    reason: str | None = None
    model: str | None = None
    dtype: str | None = None
    device: str | None = None
    fingerprint: str | None = None


class ScoreRequest(msgspec.Struct, frozen=True, tag="score"):
    """One answer to score. ``deadline`` is on the machine's monotonic clock, in seconds."""

    id: int
    prompt_ids: list[int]
    answer_ids: list[int]
    deadline: float
    options: ScoreOptions = ScoreOptions()


class CancelRequest(msgspec.Struct, frozen=True, tag="cancel"):
    """Nobody waits for this answer's score any more."""

    id: int


class ScoreReply(msgspec.Struct, frozen=True):
    """The uncertainty of one answer, in JSON form."""

    id: int
    result: dict[str, Any]
