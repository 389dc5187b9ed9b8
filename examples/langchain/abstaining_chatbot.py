"""A chatbot that says when it does not know. Drafts that it is unsure of are never shown, streamed or not.

    pip install 'langchain-gnuq[agents]'
    python examples/langchain/abstaining_chatbot.py "What is the chemical symbol for gold?" "What is 17 * 23?"

Without questions it reads them from the terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from arguments import chat_model, parser, policy
from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from langchain_gnuq.middleware import AbstainWhenUncertain
from langgraph.checkpoint.memory import InMemorySaver


def typed() -> Iterator[str]:
    """Lines from the terminal."""
    print("you> ", end="", flush=True)
    for line in sys.stdin:
        if line.strip():
            yield line.strip()
        print("you> ", end="", flush=True)


def main() -> None:
    """Hold the conversation."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("questions", nargs="*")
    args = arguments.parse_args()
    agent = create_agent(
        chat_model(args.base_url, args.api_key, args.model),
        system_prompt="Answer in a few words.",
        middleware=[AbstainWhenUncertain(policy(args), text="I don't know.")],
        checkpointer=InMemorySaver(),
    )
    thread = {"configurable": {"thread_id": "conversation"}}
    for question in args.questions or typed():
        if args.questions:
            print(f"you> {question}")
        print("bot> ", end="", flush=True)
        for message, _ in agent.stream({"messages": question}, thread, stream_mode="messages"):
            if isinstance(message, AIMessage):
                print(message.text, end="", flush=True)
        last = agent.get_state(thread).values["messages"][-1]
        gate = last.response_metadata.get("uncertainty_gate")
        probability = last.response_metadata["uncertainty"]["normalized"]["probability"]
        print(f"\n     [{gate['reason'] if gate else f'probability {probability:.3f}'}]")


if __name__ == "__main__":
    main()
