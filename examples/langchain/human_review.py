"""Uncertain answers wait for a person, in a SQLite file: stop this program at any moment and start it again.

    pip install 'langchain-gnuq[agents]' langgraph-checkpoint-sqlite
    python examples/langchain/human_review.py --db review.sqlite --thread 7 "What is the capital of Burkina Faso?"

It stops at the question to the person. Kill it there: the same command without the question, in any process,
shows the person what waits and finishes the run. The model is not asked again.
"""

from __future__ import annotations

import sys
from typing import Any

from arguments import chat_model, parser, policy
from langchain.agents import create_agent
from langchain_gnuq.middleware import AskHumanWhenUncertain
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command


def main() -> int:
    """Ask the model, or a person about what waits."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--db", required=True, metavar="FILE", help="SQLite file of the runs")
    arguments.add_argument("--thread", default="1", help="which conversation")
    arguments.add_argument("question", nargs="?", help="none: go on with what waits in this thread")
    args = arguments.parse_args()
    thread: Any = {"configurable": {"thread_id": args.thread}}
    with SqliteSaver.from_conn_string(args.db) as saver:
        agent = create_agent(
            chat_model(args.base_url, args.api_key, args.model),
            system_prompt="Answer in a few words.",
            middleware=[AskHumanWhenUncertain(policy(args))],
            checkpointer=saver,
        )
        if args.question:
            agent.invoke({"messages": args.question}, thread)
        elif not agent.get_state(thread).interrupts:
            print(f"nothing waits in thread {args.thread} of {args.db}", file=sys.stderr)
            return 1
        while waiting := agent.get_state(thread).interrupts:
            asked = waiting[0].value
            print(f"draft>  {asked['action_requests'][0]['args']['text']}")
            print(f"reason> {asked['reason']}")
            print("Your answer (empty: the draft is right): ", flush=True)
            answer = sys.stdin.readline().strip()
            decision = answer or {"decisions": [{"type": "approve"}]}
            agent.invoke(Command(resume=decision), thread)
        for message in agent.get_state(thread).values["messages"]:
            gate = message.response_metadata.get("uncertainty_gate")
            print(f"{message.type}> {message.text}" + (f"  [{gate['outcome']}]" if gate else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
