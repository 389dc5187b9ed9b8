"""Hand an answer, or tool calls, that the model is unsure of to a person, and wait."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, Unpack, cast

from langchain.agents.middleware import AgentState, ModelRequest, ModelResponse, hook_config
from langchain.agents.middleware.types import ExtendedModelResponse, PrivateStateAttr
from langchain_core.messages import AIMessage
from langgraph.runtime import Runtime
from langgraph.types import Command, interrupt

from gnuq_serve.policy import Policy
from langchain_gnuq.gate import ABSTAIN_TEXT
from langchain_gnuq.middleware.drafts import (
    Draft,
    GateOptions,
    Handler,
    Response,
    UncertaintyMiddleware,
    in_place_of,
    record,
)
from langchain_gnuq.middleware.review import Held, request_of, reviewed, schema_of


class _State(AgentState[Any]):
    # Not among the messages, where streams and other middleware would see it.
    uncertainty_held: NotRequired[Annotated[Held | None, PrivateStateAttr]]


class AskHumanWhenUncertain(UncertaintyMiddleware):
    """Interrupts the run where the model is unsure of its answer or tool calls, and does what a person says.

    Needs a checkpointer; with one on disk another process can resume the run, and the model is not asked again.
    The interrupt's value is that of langchain's ``HumanInTheLoopMiddleware``, with ``uncertainty`` and
    ``reason`` added: one action request for each tool call, or one named ``answer`` with the draft's text. So is
    what resumes it: ``Command(resume={"decisions": [...]})``, one decision for each action request, of type

    - ``approve``: the draft goes out, or the tool runs;
    - ``edit``, with ``edited_action``: another text, or another tool call, takes its place;
    - ``respond``, with ``message``: the person's answer, or the tool's result as the person gives it;
    - ``reject``, with an optional ``message``: the run ends with that message, by default ``text``, as its
      answer; of a tool call the model is told, and goes on.

    ``Command(resume="some text")`` is short for ``respond`` to an answer. Structured responses can be approved
    or rejected, together with the tool calls beside them. A value of another form raises pydantic's
    ``ValidationError``; nothing is lost by it, the person can be asked again.

    Until then the draft is in no message: an empty one stands in its place, ``outcome="waiting"`` in its
    ``response_metadata["uncertainty_gate"]``. The final message has an ``outcome`` of ``approved``,
    ``edited``, ``responded`` or ``rejected`` there (``reviewed`` where not all tool calls were approved).

    An answer without a score counts as uncertain (``on_unscored="uncertain"``, the default), so the person is
    asked: a gate that opens whenever the scorer is down guards nothing. ``on_unscored="pass"`` lets it through.

    Args:
        policy: decides on each message; None: the decision that came with it counts.
        text: the answer where a person rejects the draft without a word.
        **options: ``on_unscored``, ``answers``, ``tool_calls``, ``acts_on``, ``hide_drafts``: see
            `UncertaintyMiddleware`.
    """

    state_schema = _State

    def __init__(
        self, policy: Policy | None = None, *, text: str = ABSTAIN_TEXT, **options: Unpack[GateOptions]
    ) -> None:
        super().__init__(policy, **options)
        self.text = text

    def _replace(self, request: ModelRequest[Any], draft: Draft, handler: Handler) -> Response:  # noqa: ARG002
        if draft.error is not None:
            raise draft.error
        structured = draft.response.structured_response
        if draft.message.tool_calls and not draft.pending and structured is None:
            return draft.response  # a structured response that did not parse: the model is asked again anyway
        waiting = in_place_of(draft, "", "waiting")
        held: Held = {
            "waiting": str(waiting.id),
            "messages": draft.response.result,
            "structured_response": structured,
            "pending": draft.pending,
            "record": record("waiting", draft.decision),
        }
        return ExtendedModelResponse(
            model_response=ModelResponse(result=[waiting]), command=Command(update={"uncertainty_held": held})
        )

    @hook_config(can_jump_to=["end"])
    def after_model(self, state: AgentState[Any], runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002
        """Ask about the draft that is held, if this turn has one."""
        held = cast("_State", state).get("uncertainty_held")
        last = state["messages"][-1] if state["messages"] else None
        if held is None or not isinstance(last, AIMessage) or last.id != held["waiting"]:
            return None  # also a draft of a turn that was never resumed
        review: Any = interrupt(request_of(held), response_schema=schema_of(held))
        return reviewed(held, review.decisions, self.text)

    @hook_config(can_jump_to=["end"])
    async def aafter_model(self, state: AgentState[Any], runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Ask about the draft that is held, if this turn has one."""
        return self.after_model(state, runtime)
