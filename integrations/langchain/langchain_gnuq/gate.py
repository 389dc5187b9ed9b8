"""One rule for every gate of this package: is this answer good enough to pass, and if not, what then?"""

from __future__ import annotations

import dataclasses
from typing import Literal, cast, get_args

from langchain_core.messages import BaseMessage

from gnuq_serve.policy import Action, Decision, Policy
from gnuq_serve.uncertainty import Uncertainty
from langchain_gnuq.message import uncertainty_of

OnUnscored = Literal["pass", "uncertain"]

ABSTAIN_TEXT = "I am not sure enough to answer that."


class Gate:
    """Decides on a message; unlike a bare `Policy` it always comes to a decision.

    Args:
        policy: decides on scored answers. None: the decision that the server (or a callback handler) has already
            put on the answer counts.
        on_unscored: what to do with an answer on which nothing can be decided: not scored, or without the
            policy's signal. ``"uncertain"`` treats it as one below all thresholds (the policy's ``otherwise``),
            ``"pass"`` as a sure one. The first is the safe one: a gate that opens whenever the scorer is down
            guards nothing.

    Raises:
        ValueError: ``on_unscored`` is unknown.
    """

    def __init__(self, policy: Policy | None = None, on_unscored: OnUnscored = "uncertain") -> None:
        if on_unscored not in get_args(OnUnscored):
            raise ValueError(f"on_unscored={on_unscored!r} is unknown; choose 'pass' or 'uncertain'")
        self.policy = policy
        self.on_unscored = on_unscored

    def decide(self, message: BaseMessage) -> Decision:
        """The decision on one message; its ``action`` is never None. Never raises."""
        uncertainty = uncertainty_of(message)
        try:
            decision = _already_made(uncertainty) if self.policy is None else self.policy.decide(uncertainty)
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:  # a number in it is none
            malformed = Uncertainty.failed(f"the uncertainty object is malformed: {error}")
            decision = _already_made(malformed)
        if decision.action is not None:
            return decision
        action: Action = "answer"
        if self.on_unscored == "uncertain":
            # A policy may say ``otherwise="answer"``; what was never looked at is not that.
            otherwise = "abstain" if self.policy is None else self.policy.otherwise
            action = "abstain" if otherwise == "answer" else otherwise
        return dataclasses.replace(
            decision, action=action, reason=f"{decision.reason}; on_unscored={self.on_unscored!r}"
        )


def _already_made(uncertainty: Uncertainty) -> Decision:
    """The decision that came with the answer."""
    known = isinstance(uncertainty.decision, str) and uncertainty.decision in get_args(Action)
    if known:
        reason = "decided before it came here"
    elif uncertainty.status != "scored":
        reason = f"the answer was not scored: {uncertainty.status} ({uncertainty.reason})"
    else:
        reason = "the answer carries no decision: calibrate the server, or give a policy"
    return Decision(
        action=cast("Action", uncertainty.decision) if known else None,
        signal="p_correct",
        value=uncertainty.p_correct,
        calibration=uncertainty.calibration,
        reason=reason,
    )
