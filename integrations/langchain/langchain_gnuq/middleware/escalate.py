"""Ask a stronger model where the first one is unsure of its answer or of its tool calls."""

from __future__ import annotations

from typing import Any, Unpack

from langchain.agents.middleware import ModelRequest, ModelResponse
from langchain.chat_models import init_chat_model
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage

from gnuq_serve.policy import Policy
from langchain_gnuq.middleware.drafts import (
    AsyncHandler,
    Draft,
    GateOptions,
    Handler,
    Response,
    UncertaintyMiddleware,
    hidden,
    is_hidden,
    marked,
)


class EscalateWhenUncertain(UncertaintyMiddleware):
    """Has a stronger model do again what the model is unsure of, answer or tool calls; the draft is dropped.

    The stronger model gets the same request: messages, tools, response format. Its message carries
    ``response_metadata["uncertainty_gate"]`` with ``outcome="escalated"`` and the reason; its
    ``["uncertainty"]`` is its own, where its server gives one. **It is not gated here**, and no calibration of
    the first model promises anything about it: put a second gate before this one in the agent's list for that.
    An error of the stronger model is the run's.

    An answer without a score counts as uncertain (``on_unscored="uncertain"``, the default), so the stronger
    model is asked: a gate that opens whenever the scorer is down guards nothing. ``on_unscored="pass"``
    lets it through.

    Args:
        strong_model: a chat model, or a name that ``init_chat_model`` takes.
        policy: decides on each message; None: the decision that came with it counts.
        **options: ``on_unscored``, ``answers``, ``tool_calls``, ``acts_on``, ``hide_drafts``: see
            `UncertaintyMiddleware`. The stronger model's tokens stream at once, unless a gate further out hides
            them.
    """

    def __init__(
        self, strong_model: BaseChatModel | str, policy: Policy | None = None, **options: Unpack[GateOptions]
    ) -> None:
        super().__init__(policy, **options)
        self.strong_model = init_chat_model(strong_model) if isinstance(strong_model, str) else strong_model

    def _replace(self, request: ModelRequest[Any], draft: Draft, handler: Handler) -> Response:
        return _escalated(handler(self._stronger(request)), draft)

    async def _areplace(self, request: ModelRequest[Any], draft: Draft, handler: AsyncHandler) -> Response:
        return _escalated(await handler(self._stronger(request)), draft)

    def _stronger(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        strong = hidden(self.strong_model) if is_hidden(request.model) else self.strong_model
        return request.override(model=strong)


def _escalated(response: ModelResponse[Any], draft: Draft) -> ModelResponse[Any]:
    messages = [
        marked(message, "escalated", draft.decision) if isinstance(message, AIMessage) else message
        for message in response.result
    ]
    return ModelResponse(result=messages, structured_response=response.structured_response)
