"""Processor seconds of a score, against ten samples on the same server.

What scoring costs is what the server's processes use for scored answers, less what they use for as many answers
that are not scored. What self-consistency costs is what they use for ten samples (`n: 10`, so that the prompt is
read once), less one answer: the answer itself counts as the tenth sample. Comparing the samples is not counted,
though it is not free. vLLM's processes spin while they work, so the difference of their two totals is noisy; the
scorer's own processor time is given too. The ways take turns.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from gnuq_serve.managed_server import ManagedServer
from load.client import Client, Reply
from load.figures import statuses
from load.prompts import chat, long_questions, questions
from load.server import CpuClock

SAMPLES = 10


async def compare(
    client: Client, running: ManagedServer, *, answers: int, tokens: int, long: bool, at_a_time: int
) -> list[dict[str, Any]]:
    """One record for each way of scoring.

    Args:
        client: of the server.
        running: the server, whose processes are measured.
        answers: how many for each way.
        tokens: length of each answer.
        long: prompts of about 1,000 tokens instead of short questions.
        at_a_time: requests under way.
    """
    texts = (long_questions if long else questions)(seed=3)
    modes = ("exact", "answer_only") if long else ("exact",)
    ways: dict[str, dict[str, Any]] = {"not scored": {"uncertainty": False}}
    ways |= {mode: {"uncertainty": {"mode": mode}} for mode in modes}
    ways["ten samples"] = {"uncertainty": False, "n": SAMPLES, "temperature": 1.0}
    used = {name: Use() for name in ways}
    with tqdm(total=answers * len(ways), desc=f"{tokens} tokens", unit="answer") as bar:
        for start in range(0, answers, at_a_time):
            for name, more in ways.items():
                number = min(at_a_time, answers - start)
                bodies = [chat(next(texts), tokens, **more) for _ in range(number)]
                await _use(client, running, bodies, tokens * more.get("n", 1), used[name])
                bar.update(number)
    plain = used["not scored"].total
    rival = used["ten samples"].total - plain
    setting = {"prompt": "1,000 tokens" if long else "short", "answer_tokens": tokens, "at_a_time": at_a_time}
    records = []
    for name, use in used.items():
        record = {"way": name, **setting, "answers": answers, "cpu_seconds": use.total, "seconds": use.seconds}
        if name != "not scored":
            record["cpu_seconds_of_the_score"] = (use.total - plain) / answers
        if name in modes:
            record["cpu_seconds_of_the_scorer"] = use.scorer / answers
            record["times_cheaper"] = rival / (use.total - plain)
            record["times_cheaper_by_the_scorer_alone"] = rival / use.scorer
        records.append(record | {"statuses": statuses(use.replies)})
    return records


@dataclass
class Use:
    """What one way has used so far, in seconds."""

    seconds: float = 0.0
    scorer: float = 0.0
    server: float = 0.0
    replies: list[Reply] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Of all processes."""
        return self.scorer + self.server


async def _use(
    client: Client, running: ManagedServer, bodies: list[dict[str, Any]], tokens: int, use: Use
) -> None:
    clock, start = CpuClock(running), time.monotonic()
    replies = await asyncio.gather(*map(client.ask, bodies))
    use.seconds += time.monotonic() - start
    cpu = clock.seconds()
    use.scorer, use.server = use.scorer + cpu["scorer"], use.server + cpu["server"]
    use.replies += replies
    if any(reply.completion_tokens != tokens for reply in replies):
        raise RuntimeError(f"an answer is not whole: {[reply.error for reply in replies]}")
