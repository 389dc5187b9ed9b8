"""The audits: a random share of the answers is marked, and their labels test what was promised of all answers."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from gnuq_serve.calibration.audit import AuditTest
from gnuq_serve.service.decisions import Decisions
from gnuq_serve.service.operator.label_store import LabelledAnswer, LabelStore
from gnuq_serve.service.operator.score_log import log_row, text_row
from gnuq_serve.service.seeing import metrics
from gnuq_serve.service.seeing.observation import Observation

logger = logging.getLogger(__name__)

_MOMENT = 1.0  # seconds
_CONFIDENCE = 0.95  # of a calibration that is no longer loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What the labels say of one promise.

    Attributes:
        calibration: id of the calibration that promised.
        max_error: the promised share of errors among answered questions.
        confidence: a kept promise is called broken with probability at most ``1 - confidence``, ever.
        right: labelled so.
        wrong: labelled so.
        waiting: drawn and not labelled yet; the test is only as good as they are few.
        broken: the labels so far contradict the promise.
        risk: interval of the share of errors, valid at all times together.
    """

    calibration: str
    max_error: float
    confidence: float
    right: int
    wrong: int
    waiting: int
    broken: bool
    risk: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {**asdict(self), "risk": list(self.risk)}


def promise_of(decisions: Decisions, calibration_id: str | None) -> float | None:
    """The share of errors that a calibration's decisions keep to; None for thresholds by hand, or without one."""
    for name, calibration in decisions.calibrations.items():
        if calibration.id == calibration_id:
            policy = decisions.policies.get(name)
            if policy is not None:
                return policy.max_error
            level = calibration.levels[0] if decisions.max_error is None else decisions.max_error
            return None if calibration.threshold_for(level) is None else level
    return None


def audit_reports(
    answers: Iterable[LabelledAnswer], confidence_of: Callable[[str], float | None]
) -> list[AuditReport]:
    """One report for each promise under which answers were given.

    Args:
        answers: those drawn at random, in the order in which they were.
        confidence_of: of a calibration, by its id; None: not known.
    """
    promises: dict[tuple[str, float], list[bool | None]] = {}
    for answer in answers:
        if answer.audit and answer.decision == "answer" and answer.calibration and answer.max_error is not None:
            promises.setdefault((answer.calibration, answer.max_error), []).append(answer.correct)
    reports = []
    for (calibration, max_error), labels in promises.items():
        test = AuditTest(max_error, confidence_of(calibration) or _CONFIDENCE)
        test.add_all([correct for correct in labels if correct is not None])
        reports.append(
            AuditReport(
                calibration=calibration,
                max_error=max_error,
                confidence=test.confidence,
                right=test.answers - test.errors,
                wrong=test.errors,
                waiting=labels.count(None),
                broken=test.broken,
                risk=test.risk_interval(),
            )
        )
    return reports


class AuditWatch:
    """Writes marked answers down, and tests the promises with the labels that come."""

    def __init__(self, store: LabelStore, decisions: Callable[[], Decisions], *, with_text: bool) -> None:
        """Nothing is read yet.

        Args:
            store: of the labels.
            decisions: those in use.
            with_text: question and answer are kept with a marked answer.
        """
        self._store, self._decisions, self._with_text = store, decisions, with_text
        self._task: asyncio.Task[None] | None = None
        self._warned: set[tuple[str, float]] = set()

    def observe(self, observation: Observation) -> None:
        """Write a marked answer down; an observer of the service."""
        result = observation.result
        if not result.get("audit"):
            return
        row = log_row(observation) | (text_row(observation) if self._with_text else {})
        self._store.mark(
            LabelledAnswer(
                id=result["id"],
                audit=True,
                decision=result["decision"],
                calibration=result["calibration"],
                max_error=promise_of(self._decisions(), result["calibration"]),
                row=row,
            )
        )

    def show_soon(self) -> None:
        """Show what the labels say, within a moment: many may come at once."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._show_later())

    def stop(self) -> None:
        """Show nothing any more."""
        if self._task is not None:
            self._task.cancel()

    async def _show_later(self) -> None:
        await asyncio.sleep(_MOMENT)
        await self.show()

    async def show(self) -> None:
        """Show what labels of earlier runs say."""
        try:
            await self.reports()
        except (sqlite3.Error, OSError, RuntimeError) as error:
            logger.error("labels_path=%s can't be read: %s", self._store.path, error)

    async def reports(self) -> list[AuditReport]:
        """Test all promises with the labels that there are, show that as metrics, and warn once of a broken one.

        Raises:
            sqlite3.Error: labels can't be read.
        """
        confidences = {one.id: one.confidence for one in self._decisions().calibrations.values()}
        answers = await asyncio.wrap_future(self._store.audited())
        reports = await asyncio.to_thread(audit_reports, answers, confidences.get)
        for report in reports:
            self._show(report)
        return reports

    def _show(self, report: AuditReport) -> None:
        labels = (report.calibration, f"{report.max_error:g}")
        for name, count in (("right", report.right), ("wrong", report.wrong), ("waiting", report.waiting)):
            metrics.AUDIT_ANSWERS.labels(*labels, name).set(count)
        metrics.AUDIT_BROKEN.labels(*labels).set(report.broken)
        for name, value in zip(("low", "high"), report.risk, strict=True):
            metrics.AUDIT_RISK.labels(*labels, name).set(value)
        key = (report.calibration, report.max_error)
        if report.broken and key not in self._warned:
            self._warned.add(key)
            logger.warning(
                "calibration %s promised at most %g errors among answers; the audit's labels (%d right, %d "
                "wrong) contradict that: the share lies between %.3f and %.3f. Calibrate again",
                report.calibration,
                report.max_error,
                report.right,
                report.wrong,
                *report.risk,
            )
