"""From scores to decisions: the operator's calibrations and policy, applied to every result."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from gnuq_serve.calibration import Calibration, CalibrationError
from gnuq_serve.policy import Policy
from gnuq_serve.service.requests.request_plan import InvalidRequestError
from gnuq_serve.service.settings.model import Settings
from gnuq_serve.service.settings.sources import SettingsError
from gnuq_serve.uncertainty import Mode, Uncertainty

logger = logging.getLogger(__name__)

_P_CORRECT = "p_correct"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What a calibration checks besides the score; None and missing parts are not checked.

    Attributes:
        prompt_tokens: length of the prompt.
        turns: messages of the user in the prompt.
        finish_reason: why the answer ended.
        parts: what it was made with (`gnuq_serve.calibration.binding`).
    """

    prompt_tokens: int | None = None
    turns: int | None = None
    finish_reason: str | None = None
    parts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """Calibrations by name, and what is done with their ``p_correct``. Immutable: a reload makes another one.

    Attributes:
        calibrations: by the names that requests use.
        policies: one for each calibration, and under None the one where none is chosen; where there is no policy,
            a calibration's own threshold decides, ``answer`` or ``abstain``.
        default: the calibration where nobody names one.
        by_key: SHA-256 of an API key, and its calibration.
        max_error: the level that decides; None: each calibration's first.
    """

    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    policies: Mapping[str | None, Policy | None] = field(default_factory=dict)
    default: str | None = None
    by_key: Mapping[str, str] = field(default_factory=dict)
    max_error: float | None = None

    @classmethod
    def load(cls, settings: Settings) -> Self:
        """Read the files that the settings name.

        Raises:
            SettingsError: a file can't be used, no threshold keeps the level that decides, or nothing could ever
                be decided although answers are to be held back; the message names the setting.
        """
        calibrations = {}
        for name, path in settings.calibrations.items():
            try:
                calibrations[name] = Calibration.load(path)
            except CalibrationError as error:
                raise SettingsError(f"calibrations.{name}: {error}") from error
        policy = _read_policy(settings.policy)
        policies: dict[str | None, Policy | None] = {
            name: _policy(policy, calibration, settings.max_error) for name, calibration in calibrations.items()
        }
        if not calibrations or (policy or {}).get("signal", _P_CORRECT) != _P_CORRECT:
            policies[None] = _policy(policy, None, settings.max_error)
        default = settings.default_calibration
        if default is None and len(calibrations) == 1:
            default = next(iter(calibrations))
        made = cls(
            calibrations=calibrations,
            policies=policies,
            default=default,
            by_key=dict(settings.calibration_by_key),
            max_error=settings.max_error,
        )
        made._check(settings)
        return made

    def name_for(self, asked: str | None, key_hash: str | None = None) -> str | None:
        """The calibration of a request: the one that it names, else its API key's, else the default.

        Args:
            asked: what the request names.
            key_hash: SHA-256 of its API key in hexadecimal.
        """
        return asked or self.by_key.get(key_hash or "") or self.default

    def check_name(self, asked: str | None) -> None:
        """Refuse a name that no calibration has.

        Raises:
            InvalidRequestError: the message names those that there are.
        """
        if asked is not None and asked not in self.calibrations:
            known = ", ".join(self.calibrations) or "none is loaded here"
            raise InvalidRequestError(f"uncertainty.calibration={asked!r:.80} is unknown; known: {known}")

    def needs_semantic(self, name: str | None) -> bool:
        """Whether a calibration reads signals of the second backward pass."""
        calibration = self.calibrations.get(name or "")
        return calibration is not None and calibration.requires.semantic

    def decide(self, uncertainty: Uncertainty, name: str | None, answered: Answered) -> Uncertainty:
        """The uncertainty with ``p_correct``, ``decision`` and ``calibration`` where they can be known.

        Where a calibration does not apply, they stay None and a warning says which part differs. An answer
        without a score comes back as it is.

        Args:
            uncertainty: a final result.
            name: of the calibration (`name_for`).
            answered: the answer that was scored.
        """
        if uncertainty.status != "scored":
            return uncertainty
        calibration = self.calibrations.get(name or "")
        if calibration is not None:
            uncertainty = calibration.apply(
                uncertainty,
                prompt_tokens=answered.prompt_tokens,
                turns=answered.turns,
                finish_reason=answered.finish_reason,
                max_error=self.max_error,
                parts=answered.parts,
            )
        policy = self.policies.get(name if calibration is not None else None)
        if policy is None:
            return uncertainty
        # Not Policy.apply: where the policy says nothing, neither does the calibration's own threshold.
        decision = policy.decide(uncertainty)
        return uncertainty.replace(
            decision=decision.action,
            calibration=decision.calibration if decision.action is not None else uncertainty.calibration,
        )

    def _check(self, settings: Settings) -> None:
        for name, calibration in self.calibrations.items():
            threshold = calibration.threshold_for(self.max_error)
            policy = self.policies.get(name)
            if threshold is None and policy is None:
                why = f"calibrations.{name}: {calibration.why_none(self.max_error)}"
                if self.max_error is not None or settings.on_uncertain == "abstain":
                    raise SettingsError(f"{why}; set max_error higher, or give a policy with a threshold by hand")
                logger.warning("%s; its decision is always `abstain`", why)
            mode: Mode | str = calibration.fingerprint.get("mode", settings.mode)
            if mode != settings.mode:
                what = f"calibrations.{name} is for mode {mode}, and answers are scored in mode {settings.mode}"
                if settings.on_uncertain == "abstain" and name == self.default:
                    raise SettingsError(f"{what}: nothing would be decided; set mode to {mode}")
                logger.warning("%s unless a request says otherwise: it will not apply", what)
        if settings.on_uncertain == "abstain" and self.default is None and self.policies.get(None) is None:
            raise SettingsError(
                "on_uncertain: abstain needs a decision on each answer: name one of "
                f"{', '.join(self.calibrations)} as default_calibration"
            )


def _read_policy(given: Mapping[str, Any] | str | None) -> Mapping[str, Any] | None:
    if not isinstance(given, str):
        return given
    import yaml

    try:
        data = yaml.safe_load(Path(given).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"policy: {given}: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise SettingsError(f"policy: {given}: a mapping such as `answer: 0.8` is expected")
    return data


def _policy(
    given: Mapping[str, Any] | None, calibration: Calibration | None, max_error: float | None
) -> Policy | None:
    """The policy that goes with a calibration; the threshold is the calibration's where none is given."""
    if given is None:
        return None
    try:
        if "answer" in given:
            if max_error is not None:
                raise ValueError("a threshold by hand (policy.answer) keeps no max_error; leave one of them out")
            policy = Policy.from_dict(given)
            if policy.signal == _P_CORRECT and calibration is None:
                raise ValueError("policy: p_correct comes from a calibration; name one in calibrations")
            if calibration is not None and policy.calibration not in (None, calibration.id):
                raise ValueError(
                    f"policy: its threshold is for calibration {policy.calibration}, not for {calibration.id}"
                )
            return policy
        if calibration is None:
            raise ValueError("policy: answer is missing; without calibrations it is a threshold by hand")
        # The fields are checked before the calibration's threshold is put in.
        asked = Policy.from_dict({**given, "answer": 1.0})
        if asked.signal != _P_CORRECT:
            raise ValueError(f"policy: answer is missing; {asked.signal} has no threshold of a calibration")
        return Policy.from_calibration(calibration, max_error, escalate=asked.escalate, otherwise=asked.otherwise)
    except ValueError as error:
        text = str(error)
        raise SettingsError(text if text.startswith("policy") else f"policy: {text}") from error
