"""Many mixed requests: every answer accounted for, and nothing left behind."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from gnuq_serve.managed_server import ManagedServer
from load.client import Client, Reply, client_of
from load.figures import percentile, statuses
from load.mixture import Request, complaint, mixture
from load.server import footprint, names, total

BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting", "gnuq_queue_answers")


async def soak(
    running: ManagedServer,
    headers: Mapping[str, str],
    *,
    requests: int,
    at_a_time: int,
    first: int,
    tasks_at: str | None = None,
) -> dict[str, Any]:
    """Send them, and compare the server at the end with what it was after the ``first``.

    Args:
        running: the server.
        headers: of each request.
        requests: how many in all.
        at_a_time: under way.
        first: after how many the server is looked at for the first time.
        tasks_at: where the server tells its number of asyncio tasks; None: nowhere.
    """
    bodies = mixture()
    replies = await _send(running, headers, [next(bodies) for _ in range(first)], at_a_time)
    before = await _at_rest(running, headers, tasks_at)
    start = time.monotonic()
    replies += await _send(running, headers, [next(bodies) for _ in range(requests - first)], at_a_time)
    seconds = time.monotonic() - start
    after = await _at_rest(running, headers, tasks_at)
    complaints = [text for request, reply in replies if (text := complaint(request, reply)) is not None]
    wanted = [reply for request, reply in replies if request.scores]
    return {
        "requests": requests,
        "at_a_time": at_a_time,
        "seconds": seconds,
        "kinds": dict(Counter(request.kind for request, _ in replies)),
        "hung_up": sum(reply.hung_up for _, reply in replies),
        "complaints": len(complaints),
        "first_complaints": complaints[:10],
        "statuses": statuses(wanted),
        "seconds_p50": percentile([reply.seconds for reply in wanted], 50),
        "seconds_p99": percentile([reply.seconds for reply in wanted], 99),
        **_grown(before, after),
        "before": before,
        "after": after,
    }


async def _send(
    running: ManagedServer, headers: Mapping[str, str], requests: list[Request], at_a_time: int
) -> list[tuple[Request, Reply]]:
    places = asyncio.Semaphore(at_a_time)
    with tqdm(total=len(requests), desc=f"{at_a_time} at a time", unit="request") as bar:
        async with client_of(running.base_url, headers) as client:

            async def one(request: Request) -> tuple[Request, Reply]:
                async with places:
                    reply = await client.ask(request.body, hang_up_after=request.hang_up_after)
                    bar.update()
                    return request, reply

            return await asyncio.gather(*map(one, requests))


async def _at_rest(running: ManagedServer, headers: Mapping[str, str], tasks_at: str | None) -> dict[str, Any]:
    """The server's footprint when nothing is under way, and no connection open, any more."""
    async with client_of(running.base_url, headers) as client:
        deadline = time.monotonic() + 60
        while any((under_way := await gauges(client)).values()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server does not come to rest: {under_way}")
            await asyncio.sleep(0.2)
        tasks = None if tasks_at is None else int(await client.text(tasks_at))
    await asyncio.sleep(1)
    return {"processes": footprint(running), "tasks": tasks}


async def gauges(client: Client) -> dict[str, float]:
    """What is under way in engine and scorer."""
    text = await client.text("/metrics")
    return {
        name: sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))
        for name in BUSY
    }


def _grown(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    prints = [before["processes"], after["processes"]]
    return {
        "memory_ratio": total(prints[1], "uss_mib") / total(prints[0], "uss_mib"),
        "memory_ratio_by_process": {
            name: prints[1][name]["uss_mib"] / prints[0][name]["uss_mib"] for name in names(prints)
        },
        "more_fds": total(prints[1], "fds") - total(prints[0], "fds"),
        "more_threads": total(prints[1], "threads") - total(prints[0], "threads"),
        "more_tasks": None if before["tasks"] is None else after["tasks"] - before["tasks"],
    }
