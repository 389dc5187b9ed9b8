"""Say "I am not sure" rather than show an answer, or run a tool, that the model is unsure of."""

from __future__ import annotations

from typing import Any, Unpack

from langchain.agents.middleware import AgentState, ModelRequest, ModelResponse, hook_config
from langchain_core.messages import AIMessage
from langgraph.runtime import Runtime

from gnuq_serve.policy import Policy
from langchain_gnuq.gate import ABSTAIN_TEXT
from langchain_gnuq.middleware.drafts import (
    GATE_KEY,
    Draft,
    GateOptions,
    Handler,
    Response,
    UncertaintyMiddleware,
    in_place_of,
)


class AbstainWhenUncertain(UncertaintyMiddleware):
    """Ends the run with a text of your own where the model is unsure of its answer or of its tool calls.

    The draft leaves no trace in the agent's state: its text is gone, its tools do not run, and there is no
    structured response. ``response_metadata["uncertainty_gate"]`` on the text's message says why, with
    ``outcome="abstained"``; ``["uncertainty"]`` is the draft's.

    An answer without a score counts as uncertain (``on_unscored="uncertain"``, the default): a gate that opens
    whenever the scorer is down guards nothing. ``on_unscored="pass"`` lets it through.

    Args:
        policy: decides on each message; None: the decision that came with it counts.
        text: what is said instead.
        **options: ``on_unscored``, ``answers``, ``tool_calls``, ``acts_on``, ``hide_drafts``: see
            `UncertaintyMiddleware`.
    """

    def __init__(
        self, policy: Policy | None = None, *, text: str = ABSTAIN_TEXT, **options: Unpack[GateOptions]
    ) -> None:
        super().__init__(policy, **options)
        self.text = text

    def _replace(self, request: ModelRequest[Any], draft: Draft, handler: Handler) -> Response:  # noqa: ARG002
        return ModelResponse(result=[in_place_of(draft, self.text, "abstained")])

    # Without tools, an agent with a response format would ask the model again for the missing response.
    @hook_config(can_jump_to=["end"])
    def after_model(self, state: AgentState[Any], runtime: Runtime[Any]) -> dict[str, Any] | None:  # noqa: ARG002
        """End the run after an abstention."""
        last = state["messages"][-1] if state["messages"] else None
        record = last.response_metadata.get(GATE_KEY) if isinstance(last, AIMessage) else None
        return {"jump_to": "end"} if record and record["outcome"] == "abstained" else None

    @hook_config(can_jump_to=["end"])
    async def aafter_model(self, state: AgentState[Any], runtime: Runtime[Any]) -> dict[str, Any] | None:
        """End the run after an abstention."""
        return self.after_model(state, runtime)
