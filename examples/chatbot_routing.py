"""Ask a gnuq-serve server a dozen questions and decide, by uncertainty, what to do with each answer.

Start a server first (`gnuq-serve serve MODEL`), then:

    pip install langchain-gnuq rich
    python examples/chatbot_routing.py
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import openai
from langchain_gnuq import UncertaintyCallbackHandler
from langchain_openai import ChatOpenAI
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from gnuq_serve.policy import Policy

QUESTIONS = [
    "What is the capital of France?",
    "Which planet is known as the Red Planet?",
    "Who wrote Romeo and Juliet?",
    "What is the chemical symbol for gold?",
    "Does cracking your knuckles often give you arthritis?",
    "Do goldfish forget everything after three seconds?",
    "How much of their brain do people really use?",
    "Which way does water turn in a sink in Australia, and why?",
    "What happens to children who eat a lot of sugar at a party?",
    "What is 7 + 5?",
    "What is 17 * 23?",
    "What is 1234 - 789?",
]

# The thresholds stand on a raw probability, so the decisions are marked "uncalibrated".
POLICY = Policy(signal="normalized.probability", answer=0.8, escalate=0.6, otherwise="human")


def ask(base_url: str, api_key: str, model: str | None) -> list[dict[str, Any]]:
    """Each question with its answer and the uncertainty object of that answer."""
    if model is None:
        model = openai.OpenAI(base_url=base_url, api_key=api_key).models.list().data[0].id
    chat = ChatOpenAI(
        base_url=base_url,
        api_key=api_key,
        model=model,
        temperature=0,
        max_tokens=24,
        callbacks=[UncertaintyCallbackHandler(policy=POLICY)],
    )
    rows = []
    for question in track(QUESTIONS, f"Asking {model}", console=Console(stderr=True), transient=True):
        message = chat.invoke([("system", "Answer in a few words."), ("human", question)])
        uncertainty = message.response_metadata["uncertainty"]
        rows.append({"question": question, "answer": message.text, "uncertainty": uncertainty})
    return rows


def cells(u: dict[str, Any]) -> list[str]:
    """The table's numbers and decision; status and reason where there is no score."""
    if u["status"] != "scored":
        return [u["status"], "-", "-", "-", escape(u["reason"])]
    # The norm of grad S of a long answer leaves the range of a double; its logarithm does not.
    small_or_large = not u["epistemic"] and u["log_epistemic"] is not None
    epistemic = f"e^{u['log_epistemic']:.4g}" if small_or_large else number(u["epistemic"])
    decision = f"{u['decision']} ({u['calibration']})"
    headline, probability = number(u["log_grad_norm_sq"]), number(u["normalized"]["probability"])
    return [headline, probability, number(u["aleatoric"]), epistemic, decision]


def number(value: float | None) -> str:
    """Three digits, or a dash for a number that could not be given."""
    return "-" if value is None else f"{value:.3g}"


def main() -> int:
    """Ask, print the table, and fail where nothing was scored."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default=os.environ.get("GNUQ_BASE_URL", "http://127.0.0.1:8000/v1"))
    parser.add_argument("--api-key", default=os.environ.get("GNUQ_API_KEY", "EMPTY"))
    parser.add_argument("--model", help="default: the first model that the server lists")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write answers and scores to FILE")
    args = parser.parse_args()
    try:
        rows = ask(args.base_url, args.api_key, args.model)
    except openai.APIConnectionError:
        print(
            f"no server answers at {args.base_url}: start one with `gnuq-serve serve MODEL`, "
            "or name its address with --base-url",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130

    table = Table("Question", "Answer")
    table.add_column("log‖∇ℓ‖²", style="bold", justify="right")  # noqa: RUF001
    for name in ("P", "Aleatoric", "Epistemic"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Decision")
    for row in rows:
        table.add_row(escape(row["question"]), escape(row["answer"]), *cells(row["uncertainty"]))
    (Console() if sys.stdout.isatty() else Console(width=120)).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if any(row["uncertainty"]["status"] == "scored" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
