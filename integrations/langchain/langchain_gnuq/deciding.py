"""What a client adds to a served score: the ``p_correct`` of its calibration, the decision of its policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from langchain_core.messages import BaseMessage, HumanMessage

from gnuq_serve.policy import Policy
from gnuq_serve.uncertainty import Uncertainty
from langchain_gnuq.message import read_uncertainty, sent_object

if TYPE_CHECKING:
    from gnuq_serve.calibration import Calibration


@dataclass(slots=True, kw_only=True)
class Context:
    """What is known of an answer beside its score; None: not known, and not checked by a calibration.

    Attributes:
        prompt_tokens: length of the prompt.
        turns: messages of the user in the prompt.
        finish_reason: why the answer ended.
    """

    prompt_tokens: int | None = None
    turns: int | None = None
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Decider:
    """A client's calibration and policy; a second time changes nothing.

    Attributes:
        calibration: gives ``p_correct`` and a decision where the server sent neither.
        policy: decides on each scored answer that has its signal, also where the server has decided.
    """

    calibration: Calibration | None = None
    policy: Policy | None = None

    def annotate(self, metadata: dict[str, Any], context: Context) -> Uncertainty:
        """Write ``metadata["uncertainty"]`` and return it; never raises. Fields of a newer server are kept."""
        sent, uncertainty = sent_object(metadata), read_uncertainty(metadata)
        try:
            uncertainty = self.apply(uncertainty, context)
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            uncertainty = Uncertainty.failed(f"the uncertainty object is malformed: {error}")
        kept = sent if isinstance(sent, Mapping) and uncertainty.status == sent.get("status") else {}
        metadata["uncertainty"] = {**kept, **uncertainty.to_dict()}
        return uncertainty

    def apply(self, uncertainty: Uncertainty, context: Context) -> Uncertainty:
        """The uncertainty with what calibration and policy add.

        Raises:
            ArithmeticError, AttributeError, TypeError, ValueError: a number in it is none.
        """
        policy = self.policy
        if (
            self.calibration is not None
            and uncertainty.status == "scored"
            and uncertainty.p_correct is None
            and uncertainty.decision is None
        ):
            promised = policy is not None and policy.calibration == self.calibration.id
            uncertainty = self.calibration.apply(
                uncertainty,
                prompt_tokens=context.prompt_tokens,
                turns=context.turns,
                finish_reason=context.finish_reason,
                max_error=policy.max_error if policy is not None and promised else None,
            )
        return uncertainty if policy is None else policy.apply(uncertainty)


def turns_of(messages: Sequence[BaseMessage]) -> int:
    """How many messages of the user a prompt has."""
    return sum(isinstance(message, HumanMessage) for message in messages)
