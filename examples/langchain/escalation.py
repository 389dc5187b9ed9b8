"""A small self-hosted model answers what it is sure of; the rest goes to a stronger one.

    pip install 'langchain-gnuq[agents]'
    python examples/langchain/escalation.py --base-url http://small:8000/v1 --strong-base-url http://large:8000/v1

Any OpenAI-compatible server can be the stronger one. What it answers is not gated here.
"""

from __future__ import annotations

import os

from arguments import chat_model, parser, policy
from langchain.agents import create_agent
from langchain_gnuq.middleware import EscalateWhenUncertain

QUESTIONS = ["What is the chemical symbol for gold?", "What is the capital of Burkina Faso?"]


def main() -> None:
    """Answer the questions and say who did."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument(
        "--strong-base-url", default=os.environ.get("STRONG_BASE_URL"), help="default: as --base-url"
    )
    arguments.add_argument(
        "--strong-api-key", default=os.environ.get("STRONG_API_KEY"), help="default: as --api-key"
    )
    arguments.add_argument(
        "--strong-model", default=os.environ.get("STRONG_MODEL"), help="default: the first there"
    )
    arguments.add_argument("questions", nargs="*", default=QUESTIONS)
    args = arguments.parse_args()
    small = chat_model(args.base_url, args.api_key, args.model)
    strong = chat_model(
        args.strong_base_url or args.base_url, args.strong_api_key or args.api_key, args.strong_model
    )
    agent = create_agent(
        small,
        system_prompt="Answer in a few words.",
        middleware=[EscalateWhenUncertain(strong, policy(args))],
    )
    asked_strong = 0
    for question in args.questions:
        message = agent.invoke({"messages": question})["messages"][-1]
        gate = message.response_metadata.get("uncertainty_gate")
        asked_strong += gate is not None
        who = f"stronger model, since {gate['reason']}" if gate else "small model"
        print(f"Q: {question}\nA: {message.text}\n   [{who}]\n")
    print(f"{asked_strong} of {len(args.questions)} questions went to the stronger model")


if __name__ == "__main__":
    main()
