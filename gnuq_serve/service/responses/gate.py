"""What may go out: the operator's gate, as functions of the settings alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from gnuq_serve.service.requests.request_plan import InvalidRequestError, RequestPlan
from gnuq_serve.service.settings.model import Settings
from gnuq_serve.service.settings.sources import SettingsError

# uncertain: the decision is another than `answer`; unscored: no score, or no decision where one is needed.
Withheld = Literal["uncertain", "unscored"]


def withheld(settings: Settings, uncertainty: Mapping[str, Any] | None) -> Withheld | None:
    """Why an answer is held back; None: it may go out.

    Args:
        settings: ``on_uncertain`` and ``on_failure`` are read.
        uncertainty: its final uncertainty in JSON form; None: there is none.
    """
    scored = uncertainty is not None and uncertainty.get("status") == "scored"
    decision = uncertainty.get("decision") if uncertainty is not None and scored else None
    judges = settings.on_uncertain == "abstain"
    if judges and decision is not None and decision != "answer":
        return "uncertain"
    judged = decision is not None if judges else scored
    return "unscored" if not judged and settings.on_failure == "closed" else None


def check_request(settings: Settings, plan: RequestPlan) -> None:
    """Refuse what would let an answer out before it is judged, or unscored although that is not allowed.

    Raises:
        InvalidRequestError: the message names the field and the remedy.
    """
    # Settings with either of these score by default, so what is unscored was asked to be.
    if plan.unscored is not None and (settings.gates or not settings.allow_opt_out):
        raise InvalidRequestError(
            "uncertainty: false is not allowed on this server, which scores every answer; leave the field out"
        )
    if settings.gates and not plan.options.wait:
        raise InvalidRequestError(
            "uncertainty.wait: false is not allowed on this server, which holds answers back until they are "
            "scored; leave it out"
        )


def check_environment(settings: Settings, environment: Mapping[str, str] | None = None) -> None:
    """Refuse a server whose answers would not come past the gate.

    Args:
        settings: whether anything is gated.
        environment: of the process, by default.

    Raises:
        SettingsError: the message names the variable.
    """
    environment = os.environ if environment is None else environment
    rust = environment.get("VLLM_USE_RUST_FRONTEND", "0").strip()
    if (settings.gates or settings.blocks_unscored_routes) and rust not in ("", "0"):
        raise SettingsError(
            "VLLM_USE_RUST_FRONTEND=1 answers without coming past us, so on_uncertain: abstain, on_failure: "
            "closed and unscored_routes: block can't be kept; unset it"
        )
