"""The scorer's side of the socket: a thread of its own takes in what comes while a pass runs."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from gnuq_serve.service.scorer.messages import (
    CancelRequest,
    Ping,
    Pong,
    QueueFull,
    Reply,
    Request,
    ScorerConfig,
    ScoreReply,
    ScoreRequest,
    Started,
)
from gnuq_serve.service.scorer.queue import Entry, ScoreQueue

logger = logging.getLogger(__name__)

# What a client said of the engine counts this long: one that says nothing any more must not hold up the others.
ENGINE_REPORT_SECONDS = 3.0
_LOOK_AGAIN_SECONDS = 0.25
_encode = msgspec.msgpack.Encoder().encode


class Desk:
    """Answers pings, keeps the queue, and hands out batches to the one thread that scores."""

    def __init__(self, config: ScorerConfig) -> None:
        """Listen at ``config.endpoint``.

        Raises:
            zmq.ZMQError: that can't be done.
        """
        context = zmq.Context()
        self._socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self._socket.sndhwm = self._socket.rcvhwm = 0  # the queue is bounded; beyond a mark replies would be lost
        self._socket.bind(config.endpoint)
        # Each socket belongs to one thread: what the scoring thread sends goes through this pair.
        self._outbox, self._scored = (context.socket(zmq.PAIR) for _ in range(2))
        for end in (self._outbox, self._scored):
            end.sndhwm = end.rcvhwm = 0
        self._scored.bind("inproc://scored")
        self._outbox.connect("inproc://scored")
        self._queue: ScoreQueue[bytes] = ScoreQueue(
            config.max_batch_tokens, max_queue=config.max_queue, on_overload=config.on_overload
        )
        self._changed = threading.Condition()  # guards all that follows, and the queue
        self._engine_waits_until: dict[bytes, float] = {}
        self._batch_start: float | None = None
        self._yielding = False
        threading.Thread(target=self._run, name="gnuq-desk", daemon=True).start()

    def next_batch(self) -> list[Entry[bytes]]:
        """The next answers to score; waits for some, and for the engine. The batch before is done."""
        with self._changed:
            self._batch_start = None
            self._queue.done()
            while True:
                now = time.monotonic()
                self._yielding = bool(self._queue) and self._engine_waits(now)
                if not self._yielding and (batch := self._queue.next_batch(now)):
                    self._batch_start = now
                    break
                self._changed.wait(_LOOK_AGAIN_SECONDS if self._queue else None)
        for sender in {entry.sender for entry in batch}:
            self._send(sender, Started([entry.request.id for entry in batch if entry.sender == sender]))
        return batch

    @property
    def idle(self) -> bool:
        """Nothing waits to be scored."""
        with self._changed:
            return not self._queue

    def reply(self, batch: Sequence[Entry[bytes]], results: Sequence[dict[str, Any]]) -> None:
        """Send each its result."""
        seconds = time.monotonic() - (self._batch_start or 0.0)
        for entry, result in zip(batch, results, strict=True):
            self._send(entry.sender, ScoreReply(entry.request.id, result, len(batch), seconds))
            seconds = 0.0

    def _send(self, sender: bytes, reply: Reply) -> None:
        self._outbox.send_multipart([sender, _encode(reply)])

    def _engine_waits(self, now: float) -> bool:
        return any(until > now for until in self._engine_waits_until.values())

    def _run(self) -> None:
        try:
            poller = zmq.Poller()
            for socket in (self._socket, self._scored):
                poller.register(socket, zmq.POLLIN)
            while True:
                ready = dict(poller.poll())
                if self._scored in ready:
                    self._socket.send_multipart(self._scored.recv_multipart())
                if self._socket in ready:
                    sender, payload = self._socket.recv_multipart()
                    reply = self._take(sender, msgspec.msgpack.decode(payload, type=Request))
                    if reply is not None:
                        self._socket.send_multipart([sender, _encode(reply)])
        except BaseException:
            logger.exception("the scorer can't be reached any more")
            os._exit(1)  # the server starts another one

    def _take(self, sender: bytes, request: Request) -> Reply | None:
        now = time.monotonic()
        with self._changed:
            if isinstance(request, ScoreRequest):
                if not self._queue.add(sender, request):
                    return QueueFull(request.id)
                self._changed.notify()
            elif isinstance(request, CancelRequest):
                self._queue.cancel(sender, request.id)
            elif isinstance(request, Ping):
                self._note_engine(sender, now, waits=request.engine_waits)
                since = self._batch_start
                return Pong(len(self._queue), None if since is None else now - since, self._yielding)
        return None

    def _note_engine(self, sender: bytes, now: float, *, waits: bool) -> None:
        if waits:
            self._engine_waits_until[sender] = now + ENGINE_REPORT_SECONDS
        elif self._engine_waits_until.pop(sender, None) is not None:
            self._changed.notify()
