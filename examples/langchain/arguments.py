"""What all these examples are told: the server, the key, the model, and the threshold."""

from __future__ import annotations

import argparse
import os

import openai
from langchain_gnuq import ChatGnuq

from gnuq_serve import Policy


def parser(description: str, answer_at: float = 0.8) -> argparse.ArgumentParser:
    """The arguments that every example takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--base-url", default=os.environ.get("GNUQ_BASE_URL", "http://127.0.0.1:8000/v1"))
    parser.add_argument("--api-key", default=os.environ.get("GNUQ_API_KEY", "EMPTY"))
    parser.add_argument(
        "--model", default=os.environ.get("GNUQ_MODEL"), help="default: the first that the server lists"
    )
    parser.add_argument(
        "--answer-at",
        type=float,
        default=answer_at,
        metavar="P",
        help="lowest token probability (geometric mean) of an answer that is sure enough; default %(default)s",
    )
    return parser


def chat_model(base_url: str, api_key: str, model: str | None = None, max_tokens: int = 48) -> ChatGnuq:
    """A chat model of the server."""
    if model is None:
        model = openai.OpenAI(base_url=base_url, api_key=api_key).models.list().data[0].id
    return ChatGnuq(base_url=base_url, api_key=api_key, model=model, temperature=0, max_tokens=max_tokens)


def policy(args: argparse.Namespace) -> Policy:
    """Its threshold is a raw number and promises nothing; `Policy.from_calibration` gives one that does."""
    return Policy(signal="normalized.probability", answer=args.answer_at)
