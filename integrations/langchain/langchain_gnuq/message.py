"""Where the uncertainty stands on a LangChain message, read in one place by handler, model and middleware.

``response_metadata["uncertainty"]`` is ours (a handler or `ChatGnuq` wrote it);
``response_metadata["logprobs"]["uncertainty"]`` is what a stock ``ChatOpenAI`` keeps of the server's response.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.messages import BaseMessage

from gnuq_serve.uncertainty import Uncertainty

ABSENT = "the response carries no uncertainty: not a gnuq-serve server, or switched off"


def sent_object(metadata: Mapping[str, Any]) -> Any:
    """The object as it stands there, of whatever kind, or None."""
    data = metadata.get("uncertainty")
    if data is None:
        logprobs = metadata.get("logprobs")
        data = logprobs.get("uncertainty") if isinstance(logprobs, Mapping) else None
    return data


def read_uncertainty(metadata: Mapping[str, Any]) -> Uncertainty:
    """The uncertainty in a message's ``response_metadata``; never raises.

    Returns:
        One with status ``skipped`` where there is none, ``failed`` where it cannot be read.
    """
    data = sent_object(metadata)
    if data is None:
        return Uncertainty.skipped(ABSENT)
    if not isinstance(data, Mapping):
        return Uncertainty.failed(f"the uncertainty object is malformed: {data!r:.80} is no object")
    try:
        return Uncertainty.from_dict(data)
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        return Uncertainty.failed(f"the uncertainty object is malformed: {error}")


def uncertainty_of(message: BaseMessage) -> Uncertainty:
    """The uncertainty of a message; see `read_uncertainty`."""
    return read_uncertainty(message.response_metadata)
