"""From a raw uncertainty to a probability of being correct, and to a decision that keeps a promise.

Applying a calibration needs numpy only; making one needs ``pip install 'gnuq-serve[calibrate]'``.
"""

from typing import TYPE_CHECKING, Any

from gnuq_serve.calibration.artefact import Calibration, CalibrationError
from gnuq_serve.calibration.rows import Row

if TYPE_CHECKING:
    from gnuq_serve.calibration.outcome import Outcome, calibrate

__all__ = ["Calibration", "CalibrationError", "Outcome", "Row", "calibrate"]


def __getattr__(name: str) -> Any:
    if name in {"Outcome", "calibrate"}:
        from gnuq_serve.calibration import outcome

        return getattr(outcome, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
