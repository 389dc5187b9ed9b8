"""The server's side of the scorer process: starts it, restarts it, and asks it for scores."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Literal

import msgspec
import zmq
import zmq.asyncio

from gnuq_serve.score_options import ScoreOptions
from gnuq_serve.service.messages import (
    CancelRequest,
    ScorerConfig,
    ScoreReply,
    ScoreRequest,
    ScorerState,
)
from gnuq_serve.uncertainty import Uncertainty

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 30.0
DEFAULT_OPTIONS = ScoreOptions()


class ScorerUnavailableError(RuntimeError):
    """No score can be had; the message says why."""


class QueueFullError(ScorerUnavailableError):
    """As many answers as the settings allow wait already."""


class DeadlineError(ScorerUnavailableError):
    """The score did not come in time."""


class ScorerClient:
    """One scorer process and the answers that wait for it. Use from one event loop."""

    def __init__(
        self, config: ScorerConfig, *, max_queue: int = 256, on_overload: Literal["skip", "wait"] = "skip"
    ) -> None:
        """Prepare; ``config.endpoint`` is chosen here, in a folder that only this user can enter.

        Args:
            config: what the process loads.
            max_queue: answers that may be with the process at a time, waiting or being scored.
            on_overload: what happens to one more: ``"skip"`` raises at once, ``"wait"`` waits for a place.
        """
        self._config = config
        self._max_queue, self._on_overload = max_queue, on_overload
        self._places = asyncio.Semaphore(max_queue)
        # Removed at exit too; where the server is killed, the scorer process removes it.
        self._directory = tempfile.TemporaryDirectory(prefix="gnuq-", ignore_cleanup_errors=True)
        self._ids = itertools.count()
        self._pending: dict[int, asyncio.Future[Uncertainty]] = {}
        # Set at the first outcome: answers wait for the scorer's first start, but not for a restart.
        self._settled = asyncio.Event()
        self._socket: zmq.asyncio.Socket | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self.state = ScorerState(status="starting")

    def start(self) -> None:
        """Start the process in the background; scores asked for meanwhile wait for it."""
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise())

    async def stop(self) -> None:
        """End the process; what waits for a score fails."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self.state = ScorerState(status="stopped", reason="the server is shutting down")
        self._settled.set()
        self._directory.cleanup()

    async def score(
        self,
        prompt_ids: Sequence[int],
        answer_ids: Sequence[int],
        timeout: float,  # noqa: ASYNC109
        options: ScoreOptions = DEFAULT_OPTIONS,
    ) -> Uncertainty:
        """Score one answer. A cancelled call takes its answer out of the scorer's queue.

        Raises:
            QueueFullError: too many answers wait already.
            DeadlineError: no score after ``timeout`` seconds.
            ScorerUnavailableError: the process can't start, or died.
        """
        deadline = time.monotonic() + timeout
        if self._on_overload == "skip" and self._places.locked():
            raise QueueFullError(f"the scoring queue is full (max_queue={self._max_queue})")
        try:
            async with asyncio.timeout(timeout), self._places:
                await self._settled.wait()
                if self._socket is None or self.state.status != "ready":
                    raise ScorerUnavailableError(f"the scorer is not running: {self.state.reason}")
                request = ScoreRequest(next(self._ids), list(prompt_ids), list(answer_ids), deadline, options)
                return await self._exchange(self._socket, request)
        except TimeoutError:
            doing = "started" if self.state.status in {"starting", "restarting"} else "answered"
            raise DeadlineError(f"the scorer has not {doing} within {timeout:g} s") from None

    async def _exchange(self, socket: zmq.asyncio.Socket, request: ScoreRequest) -> Uncertainty:
        answer: asyncio.Future[Uncertainty] = asyncio.get_running_loop().create_future()
        self._pending[request.id] = answer
        try:
            await socket.send(msgspec.msgpack.encode(request))
            return await answer
        except asyncio.CancelledError:
            if socket is self._socket:
                # Without a bound on the queue a send never waits.
                socket.send(msgspec.msgpack.encode(CancelRequest(request.id)))
            raise
        finally:
            del self._pending[request.id]

    async def _supervise(self) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        for attempt in itertools.count():
            endpoint = f"ipc://{self._directory.name}/scorer-{attempt}.sock"
            started = time.monotonic()
            try:
                reason = await self._run_once(endpoint)
            except (OSError, msgspec.MsgspecError, zmq.ZMQError) as error:  # no memory to fork, say
                reason = f"the scorer process could not be run: {error}"
            if self.state.status == "failed":  # a wrong path or model stays wrong
                logger.error("the scorer can't start, answers go out unscored: %s", self.state.reason)
                return
            if time.monotonic() - started > 2 * LONGEST_BACKOFF_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            self.state = ScorerState(status="restarting", reason=reason)
            self._settled.set()
            logger.error("%s; restarting in %g s", reason, backoff)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LONGEST_BACKOFF_SECONDS)

    async def _run_once(self, endpoint: str) -> str:
        """Run the process to its end; why it ended."""
        threads = str(self._config.threads)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gnuq_serve.service.scorer_process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            start_new_session=True,  # a Ctrl-C in the terminal is the server's; we follow by the closed pipe
        )
        assert process.stdin is not None
        assert process.stdout is not None
        listener: asyncio.Task[None] | None = None
        try:
            config = msgspec.structs.replace(self._config, endpoint=endpoint)
            process.stdin.write(msgspec.json.encode(config) + b"\n")
            async for line in process.stdout:
                self.state = msgspec.json.decode(line, type=ScorerState)
                if self.state.status == "ready":
                    self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
                    # No bound: a send that waits would be cancelled, not failed, when the socket closes.
                    self._socket.sndhwm = self._socket.rcvhwm = 0
                    self._socket.connect(endpoint)
                    listener = asyncio.create_task(self._listen(self._socket))
                self._settled.set()
            return f"the scorer process died (exit code {await process.wait()})"
        finally:
            if listener is not None:
                listener.cancel()
            if self._socket is not None:
                self._socket.close(linger=0)
                self._socket = None
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            for answer in self._pending.values():
                if not answer.done():
                    answer.set_exception(
                        ScorerUnavailableError("the scorer process died while it held this answer")
                    )

    async def _listen(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            reply = msgspec.msgpack.decode(await socket.recv(), type=ScoreReply)
            answer = self._pending.get(reply.id)
            if answer is not None and not answer.done():  # else it was given up at its deadline
                answer.set_result(Uncertainty.from_dict(reply.result))
