"""What a person is asked about a draft, in the form of langchain's own middleware, and what follows."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

from langchain.agents.middleware.human_in_the_loop import (
    Action,
    ActionRequest,
    ApproveDecision,
    DecisionType,
    EditDecision,
    RejectDecision,
    RespondDecision,
    ReviewConfig,
)
from langchain_core.messages import AIMessage, BaseMessage, RemoveMessage, ToolMessage
from langchain_core.messages.tool import ToolCall
from pydantic import BaseModel, Field, create_model, model_validator
from typing_extensions import TypedDict

from langchain_gnuq.message import uncertainty_of
from langchain_gnuq.middleware.drafts import GATE_KEY

ANSWER = "answer"
_REJECTED = "A person did not approve this call, so it was not run. Do not make it again unless you are asked to."


class Held(TypedDict):
    """A draft that waits for a person; stands in the checkpoint.

    ``waiting`` is the id of the message in its place, ``messages`` what the model node would have returned,
    ``pending`` the calls that a tool would run, ``record`` the gate's (see `drafts.record`).
    """

    waiting: str
    messages: list[BaseMessage]
    structured_response: Any
    pending: list[ToolCall]
    record: dict[str, Any]


class _Text(TypedDict):
    text: str


class EditedAnswer(TypedDict):
    """The action of `EditAnswer`; its name does not matter."""

    name: str
    args: _Text


class EditAnswer(TypedDict):
    """Another text for the draft."""

    type: Literal["edit"]
    edited_action: EditedAnswer


class _AnswerReview(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"decisions": [{"type": "respond", "message": value}]} if isinstance(value, str) else value


def _allowed(held: Held) -> list[DecisionType]:
    if held["structured_response"] is not None:
        return ["approve", "reject"]
    return ["approve", "edit", "reject", "respond"]


def _actions(held: Held) -> list[Action]:
    message = _draft_of(held)
    # The arguments of the call that carries a structured response are that response.
    calls = held["pending"] if held["structured_response"] is None else message.tool_calls
    actions = [Action(name=call["name"], args=call["args"]) for call in calls]
    return actions or [Action(name=ANSWER, args={"text": message.text})]


def request_of(held: Held) -> dict[str, Any]:
    """The interrupt's value: langchain's ``HITLRequest`` with ``uncertainty`` and ``reason``."""
    actions, reason = _actions(held), held["record"]["reason"]
    return {
        "action_requests": [ActionRequest(**action, description=f"Uncertain: {reason}") for action in actions],
        "review_configs": [
            ReviewConfig(action_name=name, allowed_decisions=_allowed(held))
            for name in dict.fromkeys(action["name"] for action in actions)
        ],
        "uncertainty": uncertainty_of(_draft_of(held)).to_dict(),
        "reason": reason,
    }


def schema_of(held: Held) -> type[BaseModel]:
    """What may resume the run, checked before it is saved: an attribute ``decisions``, one for each action."""
    edit = EditDecision if held["pending"] else EditAnswer
    by_type = {"approve": ApproveDecision, "edit": edit, "reject": RejectDecision, "respond": RespondDecision}
    union: Any = None
    for name in _allowed(held):
        union = by_type[name] if union is None else union | by_type[name]
    count = len(_actions(held))
    each = Annotated[union, Field(discriminator="type")]
    return create_model(
        "Review",
        __base__=BaseModel if held["pending"] else _AnswerReview,
        decisions=(Annotated[list[each], Field(min_length=count, max_length=count)], ...),
    )


def reviewed(held: Held, decisions: list[dict[str, Any]], rejection: str) -> dict[str, Any]:
    """The state's update after the person has decided; ``rejection`` is the answer in place of a rejected one."""
    if all(decision["type"] == "approve" for decision in decisions):
        draft = _draft_of(held)
        final = draft.model_copy(update={"response_metadata": _metadata(held, "approved", draft)})
        return _update(held, _with(held, final), held["structured_response"])
    if held["pending"]:
        return _tool_calls(held, decisions)
    return _answer(held, decisions[0], rejection)


def _tool_calls(held: Held, decisions: list[dict[str, Any]]) -> dict[str, Any]:
    draft = _draft_of(held)
    # A structured response that did not parse is no pending call, and has its error already.
    by_id = {call["id"]: decision for call, decision in zip(held["pending"], decisions, strict=False)}
    if held["structured_response"] is not None:  # with one part rejected nothing of the message stands
        reject = next(decision for decision in decisions if decision["type"] == "reject")
        by_id = {call["id"]: reject for call in draft.tool_calls}
    calls, results = [], []
    for call in draft.tool_calls:
        decision = by_id.get(call["id"], {"type": "approve"})
        if decision["type"] == "edit":
            call = {**call, **decision["edited_action"]}
        elif decision["type"] != "approve":
            status: Literal["error", "success"] = "error" if decision["type"] == "reject" else "success"
            text = decision.get("message") or _REJECTED
            results.append(ToolMessage(text, tool_call_id=str(call["id"]), name=call["name"], status=status))
        calls.append(call)
    metadata = _metadata(held, "reviewed", draft)
    final = draft.model_copy(update={"tool_calls": calls, "response_metadata": metadata})
    kept = _with(held, final) if held["structured_response"] is None else [final]
    return _update(held, [*kept, *results], None)


def _answer(held: Held, decision: dict[str, Any], rejection: str) -> dict[str, Any]:
    if decision["type"] == "edit":
        outcome, text = "edited", decision["edited_action"]["args"]["text"]
    elif decision["type"] == "respond":
        outcome, text = "responded", decision["message"]
    else:
        outcome, text = "rejected", decision.get("message") or rejection
    draft = _draft_of(held)
    final = AIMessage(
        text,
        id=f"gnuq-{uuid.uuid4()}",
        name=draft.name,
        response_metadata=_metadata(held, outcome, None),
        usage_metadata=draft.usage_metadata,
    )
    # Without tools, an agent with a response format would ask the model again for the missing response.
    return _update(held, [final], None) | {"jump_to": "end"}


def _draft_of(held: Held) -> AIMessage:
    return next(message for message in held["messages"] if isinstance(message, AIMessage))


def _with(held: Held, final: AIMessage) -> list[BaseMessage]:
    return [final if isinstance(message, AIMessage) else message for message in held["messages"]]


def _metadata(held: Held, outcome: str, draft: AIMessage | None) -> dict[str, Any]:
    """Of the draft, for what it still says; a person's text has no uncertainty of its own."""
    metadata = {} if draft is None else draft.response_metadata
    return {**metadata, GATE_KEY: {**held["record"], "outcome": outcome}}


def _update(held: Held, messages: list[BaseMessage], structured_response: Any) -> dict[str, Any]:
    update: dict[str, Any] = {
        "messages": [RemoveMessage(id=held["waiting"]), *messages],
        "uncertainty_held": None,
    }
    if structured_response is not None:
        update["structured_response"] = structured_response
    return update
