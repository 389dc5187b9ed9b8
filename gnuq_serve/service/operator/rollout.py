"""Which answers are scored, and what is kept and watched of them: switch, share, log, audits, drift."""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gnuq_serve.service.decisions import Decisions
from gnuq_serve.service.operator.audit_watch import AuditWatch
from gnuq_serve.service.operator.control import Control
from gnuq_serve.service.operator.drift_watch import DriftWatch
from gnuq_serve.service.operator.label_store import LabelledAnswer, LabelStore, LabelStoreError
from gnuq_serve.service.operator.score_log import ScoreLog
from gnuq_serve.service.seeing.observation import Observers
from gnuq_serve.service.settings.model import Settings, check_paths
from gnuq_serve.service.settings.sources import SettingsError
from gnuq_serve.uncertainty import Uncertainty

logger = logging.getLogger(__name__)

SWITCHED_OFF = "scoring is switched off by the operator"

# What a reload changes; the rest is fixed when the server starts.
RELOADABLE = (
    "calibrations",
    "default_calibration",
    "calibration_by_key",
    "max_error",
    "policy",
    "score_fraction",
    "audit_fraction",
)


class Rollout:
    """The operator's hand on a running server."""

    def __init__(
        self, settings: Settings, decisions: Callable[[], Decisions], reload: Callable[[], list[str]]
    ) -> None:
        """Nothing is opened yet.

        Args:
            settings: those at the start; `change` takes later ones.
            decisions: those in use.
            reload: reads settings and calibrations again; names what wants a restart; raises SettingsError and
                leaves all as it is.

        Raises:
            SettingsError: the folder of a file is not there.
        """
        check_paths(settings)
        self._settings, self._decisions, self._reload = settings, decisions, reload
        self.control = Control(None)
        self._generation = 0
        self._log: ScoreLog | None = None
        self._labels: LabelStore | None = None
        self.audits: AuditWatch | None = None
        self.drift = DriftWatch(
            lambda: {one.id: one for one in decisions().calibrations.values()},
            window=settings.drift_window,
            alpha=settings.drift_alpha,
        )

    def start(self, server: str, observers: Observers) -> None:
        """Open what the settings name, and look at what the operator said before.

        Args:
            server: its name; the same in all its processes.
            observers: who is told of each result.
        """
        settings = self._settings
        self.control = Control.of(server)
        state = self.control.state
        self._generation = state.generation
        if not state.scoring:
            logger.warning("%s: switch it on with POST /v1/uncertainty/switch", SWITCHED_OFF)
        observers.append(self.drift.observe)
        if settings.score_log is not None:
            self._log = ScoreLog(Path(settings.score_log), with_text=settings.log_text)
            observers.append(self._log.observe)
        if (path := settings.labels_file) is not None:
            self._labels = LabelStore(path)
            self.audits = AuditWatch(self._labels, self._decisions, with_text=settings.log_text)
            observers.append(self.audits.observe)

    def stop(self) -> None:
        """Write what waits to be written."""
        if self._log is not None:
            self._log.close()
        if self.audits is not None:
            self.audits.stop()
        if self._labels is not None:
            self._labels.close()

    def change(self, settings: Settings) -> None:
        """Take other settings; only those in `RELOADABLE` may differ."""
        self._settings = settings

    def not_now(self, *, draw: bool = True) -> str | None:
        """Why a request is not scored now; None: it is. Asked once for each request.

        Args:
            draw: only a share of the requests is scored (``score_fraction``).
        """
        state = self.control.state
        if state.generation != self._generation:
            self._generation = state.generation
            try:
                self._reload()
            except SettingsError as error:  # the process that was asked could read them
                logger.error("settings can't be read again, the old ones hold: %s", error)
        if not state.scoring:
            return SWITCHED_OFF
        fraction = self._settings.score_fraction
        if draw and fraction < 1 and random.random() >= fraction:  # noqa: S311
            return f"not drawn: score_fraction={fraction:g}"
        return None

    def reload(self) -> list[str]:
        """Read settings and calibrations again, and have the other processes do so; what wants a restart.

        Raises:
            SettingsError: they can't be used; nothing has changed.
            ControlError: the other processes can't be told.
        """
        changed = self._reload()
        self._generation = self.control.change(reload=True).generation
        return changed

    def marked(self, uncertainty: Uncertainty) -> Uncertainty:
        """The uncertainty of a served answer, perhaps drawn for an audit."""
        fraction = self._settings.audit_fraction
        if uncertainty.status != "scored" or self._labels is None or random.random() >= fraction:  # noqa: S311
            return uncertainty
        return uncertainty.replace(audit=True)

    async def label(self, answer_id: str, *, correct: bool, volunteered: bool = False) -> bool | None:
        """Take the label of an answer that was drawn, or that has a volunteered one already.

        Args:
            answer_id: of its uncertainty.
            correct: the label.
            volunteered: from somebody who chose to give it; it counts for no audit.

        Returns:
            whether it was drawn at random; None: neither is known of it.

        Raises:
            LabelStoreError: labels are not kept, or can't be written.
        """
        audit: bool | None = await self._done(
            lambda labels: labels.label(answer_id, correct=correct, volunteered=volunteered)
        )
        if audit and not volunteered and self.audits is not None:
            self.audits.show_soon()
        return audit

    async def volunteer(self, result: Mapping[str, Any], *, correct: bool) -> None:
        """Take the label of an answer that nobody asked for.

        Raises:
            LabelStoreError: labels are not kept, or can't be written.
        """
        answer = LabelledAnswer(
            id=result["id"],
            audit=False,
            decision=result.get("decision"),
            calibration=result.get("calibration"),
            max_error=None,
            row={"id": result["id"], "correct": None, "uncertainty": dict(result)},
            correct=correct,
        )
        await self._done(lambda labels: labels.volunteer(answer))

    async def _done(self, work: Callable[[LabelStore], Any]) -> Any:
        if self._labels is None:
            raise LabelStoreError("labels are not kept here: name a file in labels_path, or in score_log")
        try:
            return await asyncio.wrap_future(work(self._labels))
        except (sqlite3.Error, OSError, RuntimeError) as error:
            raise LabelStoreError(f"labels_path={self._labels.path} can't be used: {error}") from error
