"""Settings that contradict each other: what they promise together cannot be held."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gnuq_serve.service.settings.model import Settings

_SHA256 = re.compile(r"[0-9a-f]{64}")


def contradiction(settings: Settings) -> str | None:
    """What cannot be held and the remedy, naming the settings; None: all can."""
    scorer = _of_weights(settings) or _of_scoring(settings)
    return _of_decisions(settings) or scorer or (_of_gating(settings) if settings.gates else None)


def _of_decisions(settings: Settings) -> str | None:
    known = ", ".join(settings.calibrations) or "none"
    named = {"default_calibration": settings.default_calibration}
    named |= {f"calibration_by_key.{key}": name for key, name in settings.calibration_by_key.items()}
    for where, name in named.items():
        if name is not None and name not in settings.calibrations:
            return f"{where}: {name!r} is not among calibrations ({known})"
    for key in settings.calibration_by_key:
        if not _SHA256.fullmatch(key):
            return (
                "calibration_by_key: keys are SHA-256 digests in lower-case hexadecimal (64 characters), as "
                "`printf %s KEY | sha256sum` prints them; never the API key itself"
            )
    if settings.max_error is not None and not settings.calibrations:
        return "max_error is kept by a calibration: name one in calibrations"
    return None


def _of_weights(settings: Settings) -> str | None:
    if settings.scorer_weights == "shared":
        for name in ("scorer_model", "scorer_device_map"):
            if getattr(settings, name) is not None:
                return f"scorer_weights: shared means vLLM's own weights, {name} other ones: set one of them"
        if settings.scorer_dtype != "auto":
            return "scorer_weights: shared has vLLM's dtype: leave out scorer_dtype"
    if settings.scorer_device_map is not None and settings.scorer_device != "auto":
        return "scorer_device and scorer_device_map both say where the scorer's weights go: set one of them"
    return None


def _of_scoring(settings: Settings) -> str | None:
    if not settings.allow_opt_out and not settings.score_by_default:
        return (
            "allow_opt_out: false wants every answer scored, score_by_default: false none that is not asked for; "
            "set one of them to true"
        )
    if settings.audit_fraction > 0 and settings.labels_file is None:
        return "audit_fraction needs a place for the labels: name a file in labels_path, or in score_log"
    if settings.log_text and settings.score_log is None and settings.labels_file is None:
        return "log_text: there is no log; name a file in score_log"
    return None


def _of_gating(settings: Settings) -> str | None:
    gate = "on_uncertain: abstain" if settings.on_uncertain == "abstain" else "on_failure: closed"
    if not settings.score_by_default:
        return f"{gate} needs every answer scored: set score_by_default to true"
    if settings.score_fraction < 1:
        return f"{gate} needs every answer scored: set score_fraction to 1"
    if settings.on_uncertain == "abstain" and not settings.calibrations and settings.policy is None:
        return "on_uncertain: abstain needs a decision on each answer: name a file in calibrations, or a policy"
    return None
