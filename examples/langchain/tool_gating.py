"""An agent whose tools move money: a call that the model is unsure of waits for somebody's approval.

pip install 'langchain-gnuq[agents]'
python examples/langchain/tool_gating.py "Refund my order A17, please."
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arguments import chat_model, parser, policy
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_gnuq.middleware import AskHumanWhenUncertain
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command


@tool
def refund(order: str) -> str:
    """Pay the money of an order back."""
    print(f"tool> refunding order {order}")
    return f"Order {order} is refunded."


@wrap_model_call
def tools_first(
    request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
) -> ModelResponse[Any]:
    """Small models seldom call tools by themselves; this one must, once, before it answers."""
    if isinstance(request.messages[-1], HumanMessage):
        request = request.override(tool_choice="required", model_settings={"strict": True})
    return handler(request)


def main() -> None:
    """Do what the customer wants, or ask first."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--decide", choices=["approve", "reject"], help="default: ask on the terminal")
    arguments.add_argument("wish", nargs="?", default="Refund my order A17, please.")
    args = arguments.parse_args()
    agent = create_agent(
        chat_model(args.base_url, args.api_key, args.model, max_tokens=96),
        tools=[refund],
        # Answers are only words here; tool calls are what the gate is for.
        middleware=[AskHumanWhenUncertain(policy(args), answers=False), tools_first],
        checkpointer=InMemorySaver(),
    )
    thread = {"configurable": {"thread_id": "1"}}
    print(f"user> {args.wish}")
    state = agent.invoke({"messages": args.wish}, thread)
    while pauses := state.get("__interrupt__"):
        decisions = []
        for action in pauses[0].value["action_requests"]:
            print(f"held> {action['name']}({action['args']}): {action['description']}")
            decisions.append({"type": args.decide or _ask()})
        state = agent.invoke(Command(resume={"decisions": decisions}), thread)
    print(f"bot> {state['messages'][-1].text}")


def _ask() -> str:
    return "approve" if input("Approve? [y/N] ").strip().lower() == "y" else "reject"


if __name__ == "__main__":
    main()
