"""What the server and the scorer process say to each other (msgspec over ZeroMQ; never pickle)."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from gnuq_serve.score_options import ScoreOptions
from gnuq_serve.uncertainty import Mode

OnOverload = Literal["skip", "wait"]
ScorerWeights = Literal["auto", "shared", "checkpoint"]
ScorerStatus = Literal["starting", "ready", "restarting", "failed", "stopped"]


class ScorerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the scorer process loads and where it listens; one JSON line on its standard input."""

    endpoint: str = ""  # chosen by whoever starts the process
    model: str
    served_model: str
    weights: ScorerWeights = "auto"
    shared: str | None = None  # the engine's, as a ``SharedWeights`` in JSON; None: load a checkpoint
    shared_refused: str | None = None  # why there are none although they were asked for, or auto would use them
    engine_workers: int = 1  # over which the engine's weights are split
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    threads: int = 1
    mode: Mode = "exact"  # for the warm-up
    max_batch_tokens: int = 2048
    memory_budget: str | None = None
    gpu_memory_fraction: float | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    config_overrides: dict[str, Any] = {}
    max_adapters: int = 8
    max_queue: int = 256
    on_overload: OnOverload = "skip"


class ScorerMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What the scorer takes, in bytes.

    Attributes:
        weights: all of them.
        own_weights: those that are a copy of its own; the others lie in a file or in the engine.
        pass_tokens: positions in a full pass.
        pass_bytes: what it takes beyond the weights.
        budget: what no pass goes over.
    """

    weights: int
    own_weights: int
    pass_tokens: int
    pass_bytes: int
    budget: int

    def __str__(self) -> str:
        own = "all its own" if self.own_weights == self.weights else f"{_gib(self.own_weights)} its own"
        return (
            f"weights {_gib(self.weights)} ({own}), a pass of {self.pass_tokens} tokens up to "
            f"{_gib(self.pass_bytes)} more, the longest up to {_gib(self.budget)} (memory_budget)"
        )


class ScorerState(msgspec.Struct, frozen=True, kw_only=True):
    """How the scorer process is; it prints one such line when it is ready, or when it can't be."""

    status: ScorerStatus
    reason: str | None = None
    model: str | None = None
    dtype: str | None = None
    device: str | None = None
    fingerprint: str | None = None
    weights: str | None = None  # the name of their source
    not_shared: str | None = None  # why they aren't the engine's own, where auto would rather have had those
    memory: ScorerMemory | None = None


class ScoreRequest(msgspec.Struct, frozen=True, tag="score"):
    """One answer to score. ``deadline`` is on the machine's monotonic clock, in seconds."""

    id: int
    prompt_ids: list[int]
    answer_ids: list[int]
    deadline: float
    options: ScoreOptions = ScoreOptions()
    adapter: str | None = None  # where the LoRA adapter is that gave the answer


class CancelRequest(msgspec.Struct, frozen=True, tag="cancel"):
    """Nobody waits for this answer's score any more."""

    id: int


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Are you alive? Also says whether requests wait in the engine, to which the scorer is to yield."""

    engine_waits: bool = False


Request = ScoreRequest | CancelRequest | Ping


class ScoreReply(msgspec.Struct, frozen=True, tag="result"):
    """The uncertainty of one answer, in JSON form, and how many answers were in its batch.

    The first reply of a batch also says for how many seconds it was scored; the others, 0.
    """

    id: int
    result: dict[str, Any]
    batch: int = 1
    batch_seconds: float = 0.0


class Started(msgspec.Struct, frozen=True, tag="started"):
    """These answers make the batch that is being scored now."""

    ids: list[int]


class QueueFull(msgspec.Struct, frozen=True, tag="full"):
    """This answer found no place in the queue."""

    id: int


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """I am alive.

    Attributes:
        waiting: answers in the queue.
        batch_seconds: how long the batch in hand has been going; None between two.
        yielding: answers wait because requests wait in the engine.
    """

    waiting: int = 0
    batch_seconds: float | None = None
    yielding: bool = False


Reply = ScoreReply | Started | QueueFull | Pong


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
