"""From an uncertainty to a decision: two thresholds on a signal for which higher is surer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gnuq_serve.uncertainty import Uncertainty

Action = Literal["answer", "escalate", "human", "abstain"]

UNCALIBRATED = "uncalibrated"

_SURER_WHEN_HIGHER = frozenset(
    {"p_correct", "log_probability", "normalized.probability", "signals.min_token_log_probability"}
)
_SURER_WHEN_LOWER = frozenset(
    {
        "entropy",
        "aleatoric",
        "epistemic",
        "log_epistemic",
        "log_grad_norm_sq",
        "normalized.aleatoric",
        "normalized.epistemic",
        "signals.max_entropy",
        "signals.first_entropy",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do with an answer, and why.

    ``action`` is None where the signal is missing: the answer was not scored, or no calibration is loaded.
    ``calibration`` names the calibration behind the signal, or is ``"uncalibrated"`` for a raw number.
    """

    action: Action | None
    signal: str
    value: float | None
    calibration: str | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Answer at or above one threshold, escalate at or above a lower one, otherwise something else.

    Args:
        signal: a number of the uncertainty object, by its path in the JSON (``"p_correct"``,
            ``"normalized.probability"``). Thresholds are on a scale where higher is surer, so a signal that
            falls with certainty is written with a minus: ``"-log_grad_norm_sq"``, ``"-entropy"``.
        answer: lowest value at which the answer is given.
        escalate: lowest value at which a stronger model is asked; None: never.
        otherwise: what is done below both.

    Raises:
        ValueError: an unknown signal, a wrong sign, thresholds not finite or in the wrong order, an unknown
            action.
    """

    signal: str = "p_correct"
    answer: float
    escalate: float | None = None
    otherwise: Action = "abstain"

    def __post_init__(self) -> None:
        path = self.signal.removeprefix("-")
        negated = path != self.signal
        if path not in _SURER_WHEN_HIGHER | _SURER_WHEN_LOWER:
            names = sorted(_SURER_WHEN_HIGHER) + sorted(f"-{name}" for name in _SURER_WHEN_LOWER)
            raise ValueError(f"signal={self.signal!r} is unknown; choose one of {', '.join(names)}")
        if negated != (path in _SURER_WHEN_LOWER):
            right = path if negated else f"-{path}"
            raise ValueError(f"signal={self.signal!r} falls as certainty grows; write {right!r}")
        for name, threshold in (("answer", self.answer), ("escalate", self.escalate)):
            if threshold is not None and not math.isfinite(threshold):
                raise ValueError(f"{name}={threshold} must be a finite number")
        if self.escalate is not None and self.escalate >= self.answer:
            raise ValueError(f"escalate={self.escalate} must be below answer={self.answer}")
        if self.otherwise not in get_args(Action):
            raise ValueError(
                f"otherwise={self.otherwise!r} is unknown; choose one of {', '.join(get_args(Action))}"
            )

    def decide(self, uncertainty: Uncertainty) -> Decision:
        """Decide on one answer; an answer without the signal gets ``action=None`` and the reason."""
        value = self._value(uncertainty)
        calibration = uncertainty.calibration if self.signal == "p_correct" else UNCALIBRATED
        action: Action | None
        if value is None:
            action = None
            if uncertainty.status != "scored":
                reason = f"the answer was not scored: {uncertainty.status} ({uncertainty.reason})"
            elif self.signal == "p_correct":
                reason = "p_correct is null: no calibration is loaded, or the answer lies outside of its range"
            else:
                reason = f"{self.signal} is null"
        elif value >= self.answer:
            action, reason = "answer", f"{self.signal} {value:.4g} >= {self.answer:g}"
        elif self.escalate is not None and value >= self.escalate:
            action, reason = "escalate", f"{self.answer:g} > {self.signal} {value:.4g} >= {self.escalate:g}"
        else:
            lowest = self.answer if self.escalate is None else self.escalate
            action, reason = self.otherwise, f"{self.signal} {value:.4g} < {lowest:g}"
        return Decision(action=action, signal=self.signal, value=value, calibration=calibration, reason=reason)

    def apply(self, uncertainty: Uncertainty) -> Uncertainty:
        """The uncertainty with ``decision`` filled in and ``calibration`` saying what it rests on."""
        decision = self.decide(uncertainty)
        if decision.action is None:
            return uncertainty
        return uncertainty.replace(decision=decision.action, calibration=decision.calibration)

    def _value(self, uncertainty: Uncertainty) -> float | None:
        path = self.signal.removeprefix("-")
        value: Any = uncertainty
        for name in path.split("."):
            value = getattr(value, name)
        if value is None:
            return None
        return -float(value) if self.signal.startswith("-") else float(value)
