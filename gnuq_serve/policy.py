"""From an uncertainty to a decision: two thresholds on a signal for which higher is surer."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from gnuq_serve.uncertainty import Uncertainty

if TYPE_CHECKING:
    from gnuq_serve.calibration import Calibration

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
_NUMBERS = ("answer", "escalate", "max_error")


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

    Thresholds set by hand carry no promise, on ``p_correct`` either; `from_calibration` takes the one that does.

    Args:
        signal: a number of the uncertainty object, by its path in the JSON (``"p_correct"``,
            ``"normalized.probability"``). Thresholds are on a scale where higher is surer, so a signal that
            falls with certainty is written with a minus: ``"-log_grad_norm_sq"``, ``"-entropy"``.
        answer: lowest value at which the answer is given.
        escalate: lowest value at which a stronger model is asked; None: never.
        otherwise: what is done below both.
        calibration: id of the calibration that the threshold belongs to; ``p_correct`` of any other decides
            nothing. None: whichever calibration gave it.
        max_error: the promised share of errors among answers; set by `from_calibration`.

    Raises:
        ValueError: an unknown signal, a wrong sign, thresholds not finite or in the wrong order, an unknown
            action.
    """

    signal: str = "p_correct"
    answer: float
    escalate: float | None = None
    otherwise: Action = "abstain"
    calibration: str | None = None
    max_error: float | None = None

    @classmethod
    def from_calibration(
        cls,
        calibration: Calibration,
        max_error: float | None = None,
        *,
        escalate: float | None = None,
        otherwise: Action = "abstain",
    ) -> Self:
        """The policy that answers where the calibration's promise allows it.

        Args:
            calibration: whose ``p_correct`` it will see.
            max_error: share of errors among answers; None: the calibration's first level.
            escalate: lowest ``p_correct`` at which a stronger model is asked (no promise covers its answers).
            otherwise: what is done below.

        Raises:
            ValueError: no threshold of the calibration keeps this level; the message says what it supports.
        """
        threshold = calibration.threshold_for(max_error)
        if threshold is None:
            raise ValueError(f"{calibration.why_none(max_error)}; ask for a higher max_error, or more data")
        return cls(
            answer=threshold,
            escalate=escalate,
            otherwise=otherwise,
            calibration=calibration.id,
            max_error=calibration.levels[0] if max_error is None else max_error,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """A policy from its fields, such as ``{"answer": 0.8, "escalate": 0.5, "otherwise": "human"}``.

        Raises:
            ValueError: a field is unknown, missing or of the wrong type, or the policy itself is wrong.
        """
        known = [entry.name for entry in dataclasses.fields(cls)]
        for name, value in data.items():
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
                raise ValueError(f"policy: unknown key {name!r}; {hint}")
            wanted: type | tuple[type, ...] = (int, float) if name in _NUMBERS else str
            optional = name in ("escalate", "calibration", "max_error")
            if not (isinstance(value, wanted) and not isinstance(value, bool)) and not (
                value is None and optional
            ):
                kind = "a number" if name in _NUMBERS else "a string"
                raise ValueError(f"policy: {name} must be {kind}, not {value!r}")
        if "answer" not in data:
            raise ValueError("policy: answer is missing; give the lowest value to answer at, such as answer: 0.8")
        return cls(**data)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """A policy from a YAML file with its fields.

        Raises:
            ValueError: the file is no YAML mapping, or the policy in it is wrong; the message names the file.
            OSError: the file cannot be read.
        """
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not YAML ({error})") from error
        if not isinstance(data, dict):
            raise ValueError(f"{path}: a mapping such as `answer: 0.8` is expected, not {type(data).__name__}")
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

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
        if self.calibration is not None and self.signal != "p_correct":
            raise ValueError(f"calibration={self.calibration!r} needs signal='p_correct', not {self.signal!r}")
        if self.max_error is not None and self.calibration is None:
            raise ValueError("max_error is promised by a calibration; use Policy.from_calibration")

    def decide(self, uncertainty: Uncertainty) -> Decision:
        """Decide on one answer; an answer without the signal gets ``action=None`` and the reason."""
        value = self._value(uncertainty)
        calibration = uncertainty.calibration if self.signal == "p_correct" else UNCALIBRATED
        action: Action | None
        if value is not None and self.calibration is not None and self.calibration != calibration:
            action = None
            reason = f"p_correct is from calibration {calibration}, the threshold from {self.calibration}"
        elif value is None:
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
