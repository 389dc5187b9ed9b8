"""Runs the scorer process: starts it again when it ends, and ends it when it is stuck."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from gnuq_serve.service.scorer.child import ScorerChild
from gnuq_serve.service.scorer.folder import ScorerFolder
from gnuq_serve.service.scorer.limits import ScorerLimits
from gnuq_serve.service.scorer.link import ScorerLink
from gnuq_serve.service.scorer.messages import ScorerConfig, ScorerState
from gnuq_serve.service.scorer.shared_state import SharedState

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 30.0
# One that was ready so long died of something new: no reason for a longer pause.
HEALTHY_SECONDS = 10.0
# Answers wait for a restart only while these are rare.
_WORTH_WAITING_SECONDS = 2.0


class ScorerLeader:
    """The one of a server's processes that holds the scorer's folder."""

    def __init__(
        self,
        config: ScorerConfig,
        folder: ScorerFolder,
        limits: ScorerLimits,
        on_state: Callable[[SharedState], None],
    ) -> None:
        """Prepare.

        Args:
            config: what the process loads.
            folder: where it listens, locked by this process when ``run`` is called.
            limits: when it is given up.
            on_state: told of every change, as the other processes are by the folder.
        """
        self._config, self._folder, self._limits = config, folder, limits
        self._tell_own = on_state
        self._child: ScorerChild | None = None
        self._shared = SharedState(state=ScorerState(status="starting"))

    async def run(self) -> None:
        """Keep a scorer running; returns where that is hopeless, with the state ``failed``.

        Raises:
            FileNotFoundError: the folder was removed.
            OSError: it can't be written.
        """
        self._tell(SharedState(state=ScorerState(status="starting")))
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            reason, ready_seconds = await self._live()
            state = self._shared.state
            if state.status == "failed":  # a wrong path or model stays wrong
                logger.error("the scorer can't start, answers go out unscored: %s", state.reason)
                return
            if ready_seconds >= HEALTHY_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            start = self._shared.start_seconds
            worth_waiting = ready_seconds > 0 and start is not None and backoff <= _WORTH_WAITING_SECONDS
            self._tell(
                SharedState(
                    state=ScorerState(status="restarting", reason=reason),
                    ready_by=time.monotonic() + backoff + start if worth_waiting and start else None,
                    start_seconds=start,
                )
            )
            logger.warning("%s; restarting in %g s", reason, backoff)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LONGEST_BACKOFF_SECONDS)

    def check(self, link: ScorerLink, silent_seconds: float) -> None:
        """End a scorer that is stuck.

        Args:
            link: to the scorer.
            silent_seconds: how long it has given no sign of life.
        """
        if self._child is None:
            return
        batch_seconds = link.load.batch_seconds or 0.0
        if silent_seconds >= self._limits.stuck:
            self._child.kill(f"it gave no sign of life for {silent_seconds:.0f} s (stuck_scorer_seconds)")
        elif batch_seconds >= self._limits.batch:
            self._child.kill(f"one batch took more than {self._limits.batch:g} s (max_batch_seconds)")

    async def _live(self) -> tuple[str, float]:
        """Run one process to its end: why it ended, and for how many seconds it was ready."""
        ready_at: float | None = None
        endpoint = self._folder.new_endpoint()
        start = time.monotonic()
        try:
            child = self._child = await ScorerChild.start(
                msgspec.structs.replace(self._config, endpoint=endpoint), self._folder.path
            )
        except OSError as error:  # no memory to fork, say
            return f"the scorer process could not be run: {error}", 0.0
        too_late = asyncio.get_running_loop().call_later(
            self._limits.start,
            child.kill,
            f"it was not ready after {self._limits.start:g} s (scorer_start_timeout_seconds)",
        )
        try:
            async for state in child.states():
                too_late.cancel()
                ready_at = time.monotonic()
                if state.status == "ready":
                    logger.info(
                        "the scorer is ready after %.1f s: %s in %s on %s, fingerprint %s",
                        *(ready_at - start, state.model, state.dtype, state.device, state.fingerprint),
                    )
                    logger.info("the scorer's memory: %s", state.memory)
                self._tell(SharedState(state=state, endpoint=endpoint, start_seconds=ready_at - start))
            reason = await child.ended()
        except msgspec.MsgspecError as error:
            reason = f"the scorer process sent something unreadable: {error}"
        finally:
            too_late.cancel()
            self._child = None
            child.kill("its server stops")
            await child.ended()
        return reason, 0.0 if ready_at is None else time.monotonic() - ready_at

    def _tell(self, shared: SharedState) -> None:
        self._shared = shared
        self._folder.write(shared)
        self._tell_own(shared)
