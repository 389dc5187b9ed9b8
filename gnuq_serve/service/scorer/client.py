"""The server's side of the scorer: the scores that one of its processes asks for, and whoever runs the scorer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence

from gnuq_serve.score_options import ScoreOptions
from gnuq_serve.service.scorer.engine_load import EngineLoad
from gnuq_serve.service.scorer.errors import (
    DeadlineError,
    QueueFullError,
    ScorerLostError,
    ScorerUnavailableError,
)
from gnuq_serve.service.scorer.folder import ScorerFolder
from gnuq_serve.service.scorer.leader import ScorerLeader
from gnuq_serve.service.scorer.limits import ScorerLimits
from gnuq_serve.service.scorer.link import ScorerLink
from gnuq_serve.service.scorer.messages import Pong, ScorerConfig, ScorerState
from gnuq_serve.service.scorer.shared_state import SharedState
from gnuq_serve.service.seeing import metrics
from gnuq_serve.uncertainty import Uncertainty

__all__ = ["DeadlineError", "QueueFullError", "ScorerClient", "ScorerUnavailableError"]

logger = logging.getLogger(__name__)

_TRIES = 3  # one answer's, when scorers die before its turn
_LOOK_SECONDS = 0.2  # between two looks at who leads
# A server that stops ends all its processes at about the same time: none of them should take over then.
_TAKEOVER_SECONDS = 1.0
_BEAT_SECONDS, _BEAT_SECONDS_YIELDING = 1.0, 0.1
DEFAULT_OPTIONS, DEFAULT_LIMITS = ScoreOptions(), ScorerLimits()


class ScorerClient:
    """Scores from the one scorer process of a server. Use from one event loop.

    Each of the server's processes has a client. The first to lock the scorer's folder runs the process; when it
    ends, another one takes over.
    """

    def __init__(
        self,
        config: ScorerConfig,
        *,
        server: str | None = None,
        engine_load: EngineLoad | None = None,
        limits: ScorerLimits = DEFAULT_LIMITS,
    ) -> None:
        """Prepare; the endpoint is chosen here, in a folder that only this user can enter.

        Args:
            config: what the process loads, and how much its queue holds.
            server: what tells this server from others of the machine; clients with the same one and the same
                ``config`` share a scorer. None: this one shares it with nobody.
            engine_load: requests that wait in the engine; while there are any, the scorer starts no batch. None:
                it does not care.
            limits: when a scorer that does not answer is given up.
        """
        self._config = config
        self._engine_load = engine_load
        self._places = asyncio.Semaphore(config.max_queue)
        self._folder = ScorerFolder.of(server, config)
        self._leader = ScorerLeader(config, self._folder, limits, self._on_state)
        self._shared = SharedState(state=ScorerState(status="starting"))
        self._changed = asyncio.Event()
        self._link: ScorerLink | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def state(self) -> ScorerState:
        """How the scorer process is."""
        return self._shared.state

    @property
    def load(self) -> Pong:
        """What the scorer last said of its work, all processes' answers together."""
        return Pong() if self._link is None else self._link.load

    def start(self) -> None:
        """Start the process in the background, or find the one that runs; scores asked for meanwhile wait."""
        self._tasks = [asyncio.get_running_loop().create_task(work) for work in (self._run(), self._beat())]

    async def stop(self) -> None:
        """End the process if this client runs it; what waits for a score fails."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._on_state(SharedState(state=ScorerState(status="stopped", reason="the server is shutting down")))
        self._folder.remove()

    async def score(
        self,
        prompt_ids: Sequence[int],
        answer_ids: Sequence[int],
        timeout: float,  # noqa: ASYNC109
        options: ScoreOptions = DEFAULT_OPTIONS,
        adapter: str | None = None,
    ) -> Uncertainty:
        """Score one answer. A cancelled call takes its answer out of the scorer's queue.

        An answer in the queue of a scorer that dies is given to the next one; the batch that was being scored
        fails.

        Raises:
            QueueFullError: too many answers wait already.
            DeadlineError: no score after ``timeout`` seconds.
            ScorerUnavailableError: the process can't start, died with this answer in hand, or is being restarted
                and won't be ready in time.
        """
        deadline = time.monotonic() + timeout
        config = self._config
        if config.on_overload == "skip" and self._places.locked():
            # As many from this process alone; those of the others the scorer itself counts.
            raise QueueFullError(f"the scoring queue is full (max_queue={config.max_queue})")
        try:
            async with asyncio.timeout(timeout), self._places:
                for _ in range(_TRIES):
                    link = await self._ready(deadline)
                    with contextlib.suppress(ScorerLostError):
                        return await link.score(prompt_ids, answer_ids, deadline, options, adapter)
                raise ScorerUnavailableError(f"{_TRIES} scorer processes died before this answer's turn")
        except TimeoutError:
            raise DeadlineError(self._why_late(timeout)) from None

    async def _ready(self, deadline: float) -> ScorerLink:
        """The link to a scorer that is ready. One that is restarted is waited for only where that is no waste."""
        while self._link is None:
            shared = self._shared
            in_time = shared.ready_by is not None and shared.ready_by < deadline
            if shared.state.status != "starting" and not in_time:
                raise ScorerUnavailableError(f"the scorer is not running: {shared.state.reason}")
            await self._changed.wait()
        return self._link

    def _why_late(self, timeout: float) -> str:
        doing = "started" if self._link is None else "answered"
        why = f"the scorer has not {doing} within {timeout:g} s"
        if self.load.yielding:
            why += ": it waited for the engine, where requests were waiting (yield_to_engine)"
        return why

    async def _run(self) -> None:
        """Lead, or follow whoever leads."""
        followed = False
        try:
            while True:
                if followed:
                    self._on_state(self._without_leader())
                    await asyncio.sleep(_TAKEOVER_SECONDS)
                if self._folder.lead():
                    with contextlib.suppress(FileNotFoundError):  # the folder was removed: begin anew
                        await self._leader.run()
                        return
                followed = True
                while not self._folder.abandoned():
                    self._on_state(self._folder.read() or SharedState(state=ScorerState(status="starting")))
                    await asyncio.sleep(_LOOK_SECONDS)
        except (OSError, RuntimeError) as error:
            logger.exception("the scorer can't be run, answers go out unscored")
            self._on_state(SharedState(state=ScorerState(status="failed", reason=str(error))))

    def _without_leader(self) -> SharedState:
        reason = "the server process that ran the scorer ended"
        start = self._shared.start_seconds
        ready_by = None if start is None else time.monotonic() + _TAKEOVER_SECONDS + start
        return SharedState(
            state=ScorerState(status="restarting", reason=reason), ready_by=ready_by, start_seconds=start
        )

    def _on_state(self, shared: SharedState) -> None:
        """Connect to a scorer that has become ready, and give up one that is gone."""
        if shared == self._shared:
            return
        self._shared = shared
        metrics.show_scorer_state(shared.state, runs_it=self._folder.held)
        ready = shared.state.status == "ready"
        if self._link is not None and not (ready and shared.endpoint == self._link.endpoint):
            self._link.close("the scorer process died while it held this answer")
            self._link = None
        if ready and self._link is None:
            self._link = ScorerLink(shared.endpoint, self._config.max_queue)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _beat(self) -> None:
        """Ping the scorer, and tell it whether the engine is busy; the leader ends one that is stuck."""
        seconds = _BEAT_SECONDS if self._engine_load is None else _BEAT_SECONDS_YIELDING
        while True:
            await asyncio.sleep(seconds)
            if self._link is not None:
                self._leader.check(self._link, self._link.unanswered * seconds)
                self._link.ping(engine_waits=self._engine_waits())

    def _engine_waits(self) -> bool:
        try:
            return bool(self._engine_load is not None and self._engine_load())
        except Exception:  # the engine's metrics must not cost the scores
            logger.exception("the engine's load can't be read: the scorer does not yield to it any more")
            self._engine_load = None
            return False
