"""Do the live scores still look like those of the calibration? One clear warning, and metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from gnuq_serve.calibration import Calibration
from gnuq_serve.calibration.drift import Drift, DriftMonitor
from gnuq_serve.service.seeing import metrics
from gnuq_serve.service.seeing.observation import NO_CONTEXT, Observation, RequestContext

logger = logging.getLogger(__name__)


class DriftWatch:
    """Compares ``p_correct`` of served answers with its calibration's, in this API server process."""

    def __init__(
        self, calibrations: Callable[[], Mapping[str, Calibration]], *, window: int, alpha: float
    ) -> None:
        """Begin with empty windows.

        Args:
            calibrations: those in use, by id.
            window: live scores in one comparison.
            alpha: level of one comparison.
        """
        self._calibrations, self._window, self._alpha = calibrations, window, alpha
        self._monitors: dict[str, DriftMonitor] = {}
        self._last: RequestContext = NO_CONTEXT
        self._warned: set[str] = set()

    @property
    def latest(self) -> dict[str, Drift]:
        """The last comparison of each calibration, by its id."""
        return {name: monitor.latest for name, monitor in self._monitors.items() if monitor.latest is not None}

    def observe(self, observation: Observation) -> None:
        """Take one answer into account; an observer of the service.

        Answers that a client gives to be scored are none of the server's, and several choices of one request are
        alike: the first counts.
        """
        p_correct, name = observation.result.get("p_correct"), observation.result.get("calibration")
        context = observation.context
        if p_correct is None or name is None or context.route == "uncertainty":
            return
        if context is self._last and context is not NO_CONTEXT:
            return
        self._last = context
        if (monitor := self._monitor(name)) is None or (drift := monitor.add(p_correct)) is None:
            return
        metrics.DRIFT_STATISTIC.labels(name).set(drift.statistic)
        metrics.DRIFT_P_VALUE.labels(name).set(drift.p_value)
        metrics.DRIFTED.labels(name).set(drift.drifted)
        if drift.drifted and name not in self._warned:
            self._warned.add(name)
            logger.warning("calibration %s: %s", name, drift.sentence)

    def _monitor(self, name: str) -> DriftMonitor | None:
        calibration = self._calibrations().get(name)
        if calibration is None or not calibration.reference_scores:
            return None
        if name not in self._monitors:
            self._monitors[name] = DriftMonitor(
                calibration.reference_scores, window=self._window, alpha=self._alpha
            )
        return self._monitors[name]
