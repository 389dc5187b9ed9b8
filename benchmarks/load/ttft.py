"""Time to the first token, scored and not, one request at a time."""

from __future__ import annotations

import random
import statistics
from typing import Any

from tqdm import tqdm

from load.client import Client, Reply
from load.figures import percentile, ratio_interval, statuses
from load.prompts import chat, questions

TOKENS = 24


async def measure(client: Client, pairs: int) -> dict[str, Any]:
    """The two kinds take turns, in random order; no question comes twice."""
    texts, generator = questions(seed=1), random.Random(1)
    replies: dict[bool, list[Reply]] = {True: [], False: []}
    for number in tqdm(range(-2, pairs), desc="first token", unit="pair"):
        for scored in generator.sample([True, False], 2):
            reply = await client.ask(chat(next(texts), TOKENS, stream=True, uncertainty=scored))
            if number >= 0:  # the first ones warm up
                replies[scored].append(reply)
    on, off = ([reply.first_token for reply in replies[kind]] for kind in (True, False))
    low, high = ratio_interval(on, off)
    return {
        "pairs": pairs,
        "median_seconds_on": statistics.median(on),
        "median_seconds_off": statistics.median(off),
        "p99_seconds_on": percentile(on, 99),
        "p99_seconds_off": percentile(off, 99),
        "ratio": statistics.median(on) / statistics.median(off),
        "ratio_95_percent_interval": [low, high],
        "median_seconds_from_last_token_to_score": statistics.median(
            reply.closing - reply.tokens[-1] for reply in replies[True] if reply.closing is not None
        ),
        "statuses": statuses(replies[True]),
        "raw_on": on,
        "raw_off": off,
    }
