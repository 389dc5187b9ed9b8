"""What the middleware share: a model's message is a draft until the gate has decided on it."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any, TypedDict, cast, get_args

from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
from langchain.agents.middleware.types import ExtendedModelResponse
from langchain.agents.structured_output import StructuredOutputError
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.messages.tool import ToolCall

from gnuq_serve.policy import Action, Decision, Policy
from langchain_gnuq.gate import Gate, OnUnscored
from langchain_gnuq.message import uncertainty_of

UNCERTAIN: frozenset[Action] = frozenset(get_args(Action)) - {"answer"}
GATE_KEY = "uncertainty_gate"
NOSTREAM = "nostream"  # the tag that LangGraph's `messages` stream leaves out

Response = ModelResponse[Any] | ExtendedModelResponse[Any]
Handler = Callable[[ModelRequest[Any]], ModelResponse[Any]]
AsyncHandler = Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]


class GateOptions(TypedDict, total=False):
    """What every gate can be told; see `UncertaintyMiddleware`."""

    on_unscored: OnUnscored
    answers: bool
    tool_calls: bool
    acts_on: Collection[Action]
    hide_drafts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A message that the gate holds back, with what came of it.

    ``pending`` are the calls that a tool would now run; calls that only carry a structured response are not.
    """

    message: AIMessage
    pending: list[ToolCall]
    response: ModelResponse[Any]
    decision: Decision
    error: StructuredOutputError | None


class UncertaintyMiddleware(AgentMiddleware[AgentState[Any], Any, Any]):
    """The part that finds the drafts to hold back; subclasses say what becomes of them.

    Args:
        policy, on_unscored: see `langchain_gnuq.gate.Gate`.
        answers: whether answers are gated, structured ones among them.
        tool_calls: whether messages that call tools are gated. All calls of a message, and its text, are one
            decision: the score is that of the whole message.
        acts_on: the policy's decisions that this middleware acts on; by default all but ``"answer"``. Others pass
            here, for another middleware to act on.
        hide_drafts: keep messages out of LangGraph's ``messages`` stream until the gate has decided. They then
            come whole, not token by token. Callbacks and ``astream_events`` see all model calls either way.

    Raises:
        ValueError: an argument is unknown, or nothing is gated.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        on_unscored: OnUnscored = "uncertain",
        answers: bool = True,
        tool_calls: bool = True,
        acts_on: Collection[Action] = UNCERTAIN,
        hide_drafts: bool = True,
    ) -> None:
        super().__init__()
        if not (answers or tool_calls):
            raise ValueError("answers=False and tool_calls=False: nothing would be gated; leave one on")
        if isinstance(acts_on, str) or not acts_on or not set(acts_on) <= UNCERTAIN:
            raise ValueError(f"acts_on={acts_on!r}: give some of {', '.join(sorted(UNCERTAIN))}")
        self.gate = Gate(policy, on_unscored)
        self.answers, self.tool_calls = answers, tool_calls
        self.acts_on = frozenset(acts_on)
        self.hide_drafts = hide_drafts

    def wrap_model_call(self, request: ModelRequest[Any], handler: Handler) -> Response:
        """Call the model and hold its message back where the gate says so."""
        response, error = None, None
        try:
            response = handler(self._drafting(request))
        except StructuredOutputError as caught:
            error = caught
        draft = self._judge(response, error)
        return draft if not isinstance(draft, Draft) else self._replace(request, draft, handler)

    async def awrap_model_call(self, request: ModelRequest[Any], handler: AsyncHandler) -> Response:
        """Call the model and hold its message back where the gate says so."""
        response, error = None, None
        try:
            response = await handler(self._drafting(request))
        except StructuredOutputError as caught:
            error = caught
        draft = self._judge(response, error)
        return draft if not isinstance(draft, Draft) else await self._areplace(request, draft, handler)

    def _replace(self, request: ModelRequest[Any], draft: Draft, handler: Handler) -> Response:
        """What goes out instead of a draft that is held back."""
        raise NotImplementedError

    async def _areplace(self, request: ModelRequest[Any], draft: Draft, handler: AsyncHandler) -> Response:
        """The same where the model is asked again asynchronously."""
        return self._replace(request, draft, cast("Handler", handler))

    def _drafting(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        return request.override(model=hidden(request.model)) if self.hide_drafts else request

    def _judge(
        self, response: ModelResponse[Any] | None, error: StructuredOutputError | None
    ) -> Draft | ModelResponse[Any]:
        """The draft where it is to be held back, else the response as it came.

        Raises:
            StructuredOutputError: the draft passes the gate but cannot be parsed.
        """
        if response is None:
            assert error is not None
            response = ModelResponse(result=[error.ai_message])
        message = next((m for m in reversed(response.result) if isinstance(m, AIMessage)), None)
        if message is not None and not is_settled(message):
            done = {m.tool_call_id for m in response.result if isinstance(m, ToolMessage)}
            pending = [] if error else [call for call in message.tool_calls if call["id"] not in done]
            decision = self.gate.decide(message)
            if (self.tool_calls if pending else self.answers) and decision.action in self.acts_on:
                return Draft(message=message, pending=pending, response=response, decision=decision, error=error)
        if error is not None:
            raise error
        return response


def hidden(model: BaseChatModel) -> BaseChatModel:
    """The same model, kept out of LangGraph's ``messages`` stream."""
    if isinstance(model, BaseChatModel):
        return model.model_copy(update={"tags": [*(model.tags or []), NOSTREAM]})
    return cast("BaseChatModel", cast("Any", model).with_config(tags=[NOSTREAM]))  # init_chat_model's proxy


def is_hidden(model: BaseChatModel) -> bool:
    """Whether a gate further out hides this model's messages."""
    return NOSTREAM in (getattr(model, "tags", None) or [])


def is_settled(message: AIMessage) -> bool:
    """Whether another gate has already put this message in a draft's place."""
    return (message.response_metadata.get(GATE_KEY) or {}).get("outcome") in {"abstained", "waiting"}


def record(outcome: str, decision: Decision) -> dict[str, Any]:
    """What a gate did with a draft and why; stands in ``response_metadata["uncertainty_gate"]``."""
    return {"outcome": outcome, **dataclasses.asdict(decision)}


def marked(message: AIMessage, outcome: str, decision: Decision) -> AIMessage:
    """A copy of the message with that record; the original may be in a cache."""
    metadata = {**message.response_metadata, GATE_KEY: record(outcome, decision)}
    return message.model_copy(update={"response_metadata": metadata})


def in_place_of(draft: Draft, text: str, outcome: str) -> AIMessage:
    """A message of ours that replaces a draft; it carries the draft's uncertainty and usage, not its text."""
    return AIMessage(
        content=text,
        # Another id: a stream that has shown the draft leaves out what has the same.
        id=f"gnuq-{uuid.uuid4()}",
        name=draft.message.name,
        response_metadata={
            "uncertainty": uncertainty_of(draft.message).to_dict(),
            GATE_KEY: record(outcome, draft.decision),
        },
        usage_metadata=draft.message.usage_metadata,
    )
