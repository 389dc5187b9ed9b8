"""One process's connection to the scorer that is running."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import zmq
import zmq.asyncio

from gnuq_serve.score_options import ScoreOptions
from gnuq_serve.service.scorer.errors import QueueFullError, ScorerLostError, ScorerUnavailableError
from gnuq_serve.service.scorer.messages import (
    CancelRequest,
    Ping,
    Pong,
    QueueFull,
    Reply,
    Request,
    ScoreReply,
    ScoreRequest,
    Started,
)
from gnuq_serve.service.seeing import metrics
from gnuq_serve.uncertainty import Uncertainty

_encode = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class _Waiting:
    answer: asyncio.Future[Uncertainty]
    started: bool = False


class ScorerLink:
    """The answers of this process that one scorer process has. Use from one event loop.

    Attributes:
        load: what the scorer last said of its work.
        unanswered: pings since it last said anything.
    """

    def __init__(self, endpoint: str, max_queue: int) -> None:
        """Connect.

        Args:
            endpoint: where the scorer listens.
            max_queue: places in its queue, for the message when it is full.
        """
        self.load = Pong()
        self.unanswered = 0
        self.endpoint = endpoint
        self._max_queue = max_queue
        self._ids = itertools.count()
        self._waiting: dict[int, _Waiting] = {}
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        # No bound: a send then never waits.
        self._socket.sndhwm = self._socket.rcvhwm = 0
        self._socket.connect(endpoint)
        self._listener = asyncio.get_running_loop().create_task(self._listen())

    async def score(
        self,
        prompt_ids: Sequence[int],
        answer_ids: Sequence[int],
        deadline: float,
        options: ScoreOptions,
        adapter: str | None = None,
    ) -> Uncertainty:
        """Score one answer. A cancelled call takes its answer out of the scorer's queue.

        Args:
            prompt_ids: what the model read.
            answer_ids: what it wrote.
            deadline: on the monotonic clock, in seconds; later nobody waits for the score.
            options: how to score.
            adapter: where the LoRA adapter is that wrote it; None: the base model did.

        Raises:
            QueueFullError: the scorer has no place for it.
            ScorerLostError: the scorer ended before this answer's turn.
            ScorerUnavailableError: it ended while it scored this answer.
        """
        request_id = next(self._ids)
        waiting = self._waiting[request_id] = _Waiting(asyncio.get_running_loop().create_future())
        try:
            self._send(ScoreRequest(request_id, list(prompt_ids), list(answer_ids), deadline, options, adapter))
            return await waiting.answer
        except asyncio.CancelledError:
            if not self._socket.closed:
                self._send(CancelRequest(request_id))
            raise
        finally:
            del self._waiting[request_id]

    def ping(self, *, engine_waits: bool) -> None:
        """Ask for a sign of life; it comes as ``load``."""
        self.unanswered += 1
        self._send(Ping(engine_waits))

    def close(self, reason: str) -> None:
        """Give up: what waits fails.

        Args:
            reason: of the answers whose batch was being scored.
        """
        self._listener.cancel()
        self._socket.close(linger=0)
        for waiting in self._waiting.values():
            if not waiting.answer.done():
                error = ScorerUnavailableError if waiting.started else ScorerLostError
                waiting.answer.set_exception(error(reason))

    def _send(self, request: Request) -> None:
        self._socket.send(_encode(request))

    async def _listen(self) -> None:
        while True:
            self._take(msgspec.msgpack.decode(await self._socket.recv(), type=Reply))
            self.unanswered = 0

    def _take(self, reply: Reply) -> None:
        if isinstance(reply, Pong):
            self.load = reply
            metrics.show_load(reply)
            return
        if isinstance(reply, Started):
            for request_id in reply.ids:
                if request_id in self._waiting:
                    self._waiting[request_id].started = True
            return
        if isinstance(reply, ScoreReply) and reply.batch_seconds > 0:
            metrics.observe_batch(reply.batch, reply.batch_seconds)
        waiting = self._waiting.get(reply.id)
        if waiting is None or waiting.answer.done():  # it was given up at its deadline
            return
        if isinstance(reply, QueueFull):
            waiting.answer.set_exception(
                QueueFullError(f"the scoring queue is full (max_queue={self._max_queue})")
            )
        else:
            waiting.answer.set_result(Uncertainty.from_dict(reply.result))
