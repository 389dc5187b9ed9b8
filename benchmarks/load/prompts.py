"""Requests of the load: short questions, none asked twice, and prompts of about 1,000 tokens."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

from built_in_prompts import QUESTIONS

from gnuq_serve.demo_model import NAME

# One note is about 20 tokens of SmolLM2.
_NOTES_OF_1000 = 44


def questions(seed: int = 0) -> Iterator[str]:
    """Short questions for ever; a number in front of each keeps the prefix cache from knowing it."""
    generator = random.Random(seed)
    for number in itertools.count():
        yield f"{seed}.{number}: {generator.choice(QUESTIONS)}"


def long_questions(seed: int = 0) -> Iterator[str]:
    """Questions behind notes: about 1,000 tokens of SmolLM2 each, no two with the same beginning."""
    generator = random.Random(seed)
    for question in questions(seed):
        notes = [
            f"Note {generator.randrange(10_000)}: {generator.choice(QUESTIONS)} Nobody here knows, they say."
            for _ in range(_NOTES_OF_1000)
        ]
        yield "\n".join([*notes, question])


def chat(question: str, tokens: int, **more: Any) -> dict[str, Any]:
    """A chat request whose answer has exactly ``tokens`` tokens."""
    messages = [{"role": "user", "content": question}]
    return {
        "model": NAME,
        "messages": messages,
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        **more,
    }
