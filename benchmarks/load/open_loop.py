"""Open-loop load at half of the engine's capacity: requests come at random times, whether or not others wait."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import Any

from tqdm import tqdm

from load.client import Client, Reply
from load.figures import percentile, statuses
from load.prompts import chat, questions

TOKENS = 48
AT_CAPACITY = 32


async def capacity(client: Client, seconds: float) -> float:
    """Requests a second that the engine answers with ``AT_CAPACITY`` at a time, none scored."""
    texts, done = questions(seed=2), 0
    end = time.monotonic() + seconds

    async def one_after_another() -> None:
        nonlocal done
        while time.monotonic() < end:
            await client.ask(chat(next(texts), TOKENS, uncertainty=False))
            done += 1

    start = time.monotonic()
    await asyncio.gather(*(one_after_another() for _ in range(AT_CAPACITY)))
    return done / (time.monotonic() - start)


async def load(client: Client, rate: float, seconds: float, *, scored: bool, seed: int) -> dict[str, Any]:
    """Poisson arrivals.

    Args:
        client: of the server.
        rate: requests a second.
        seconds: for how long they come.
        scored: with scores, or switched off in each request.
        seed: of the arrivals; the same for what is compared.
    """
    # Other questions each time: the prefix cache would know those of before.
    generator, texts = random.Random(seed), questions(2 * seed + scored)
    asked: list[asyncio.Task[Reply]] = []
    start = time.monotonic()
    due = start
    with tqdm(total=round(seconds), desc=f"open loop, {'on' if scored else 'off'}", unit="s") as bar:
        while (due := due + generator.expovariate(rate)) < start + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            body = chat(next(texts), TOKENS, stream=True, uncertainty=scored)
            asked.append(asyncio.create_task(client.ask(body)))
            bar.update(round(time.monotonic() - start) - bar.n)
        replies = await asyncio.gather(*asked)
    gaps = [gap for reply in replies for gap in reply.gaps]
    last_token = max(reply.tokens[-1] for reply in replies)
    scores = [reply.closing - reply.tokens[-1] for reply in replies if reply.closing is not None]
    return {
        "requests": len(replies),
        "requests_a_second": rate,
        "whole_answers": sum(reply.complete and reply.error is None for reply in replies),
        "tokens_a_second": TOKENS * len(replies) / (last_token - start),
        "inter_token_p50": percentile(gaps, 50),
        "inter_token_p99": percentile(gaps, 99),
        "first_token_p50": percentile([reply.first_token for reply in replies], 50),
        "first_token_p99": percentile([reply.first_token for reply in replies], 99),
        "last_token_to_score_p50": percentile(scores, 50),
        "last_token_to_score_p99": percentile(scores, 99),
        "seconds_mean": statistics.mean(reply.seconds for reply in replies),
        "statuses": statuses(replies),
    }
