"""The scorer process killed again and again under load: no answer is lost or late, and scoring resumes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import psutil
from tqdm import tqdm

from gnuq_serve.managed_server import ManagedServer
from load.client import Client, Reply
from load.figures import statuses
from load.prompts import chat, questions
from load.server import scorer_of

TOKENS = 16
# Between the deadline and the client: the event loop of a busy machine.
SLACK_SECONDS = 1.0


async def kill_under_load(
    client: Client, running: ManagedServer, *, kills: int, at_a_time: int, deadline: float
) -> dict[str, Any]:
    """Kill the scorer whenever it is ready and answers wait for it.

    Args:
        client: of the server.
        running: the server.
        kills: how often.
        at_a_time: requests under way.
        deadline: the server's ``deadline_seconds``.
    """
    texts, replies, over = questions(seed=5), [], False

    async def one_after_another(stream: bool) -> None:
        while not over:
            more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
            replies.append(await client.ask(chat(next(texts), TOKENS, **more)))

    asking = [asyncio.create_task(one_after_another(number % 2 == 0)) for number in range(at_a_time)]
    back = []
    start = time.monotonic()
    try:
        await client.until_ready()
        for _ in tqdm(range(kills), desc="kills", unit="kill"):
            await asyncio.sleep(1.0)  # answers are with the new scorer by then
            scorer = scorer_of(running)
            if scorer is None:
                raise RuntimeError("the scorer is ready, and no process of it is there")
            scorer.kill()
            killed = time.monotonic()
            await asyncio.to_thread(psutil.wait_procs, [scorer], 10)
            await asyncio.sleep(0.2)  # the server has noticed by then
            await client.until_ready()
            back.append(time.monotonic() - killed)
    finally:
        over = True
        await asyncio.gather(*asking)
    seconds = time.monotonic() - start
    fresh = [await client.ask(chat(next(texts), TOKENS)) for _ in range(3)]
    lost = [reply.error or f"status {reply.status}" for reply in replies if not _is_whole(reply)]
    late = [wait for reply in replies if (wait := _wait(reply)) is not None and wait > deadline + SLACK_SECONDS]
    waits = [wait for reply in replies if (wait := _wait(reply)) is not None]
    return {
        "kills": kills,
        "seconds": seconds,
        "requests": len(replies),
        "lost": len(lost),
        "first_lost": lost[:5],
        "late": len(late),
        "deadline": deadline,
        "longest_wait_for_a_score": max(waits),
        "longest_request": max(reply.seconds for reply in replies),
        "statuses": statuses(replies),
        "seconds_until_ready_again": back,
        "statuses_afterwards": statuses(fresh),
    }


def _is_whole(reply: Reply) -> bool:
    answered = reply.status == 200 and reply.error is None and reply.complete
    return answered and reply.completion_tokens == TOKENS and len(reply.uncertainties) == 1


def _wait(reply: Reply) -> float | None:
    """Seconds from the last token to the score; of a response that is no stream, the whole time."""
    if reply.closing is not None and reply.tokens:
        return reply.closing - reply.tokens[-1]
    return None if reply.tokens else reply.seconds
