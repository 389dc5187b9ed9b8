"""A client that keeps the time: when each token came, when the score, when the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

CHAT = "/v1/chat/completions"


@dataclass
class Reply:
    """What came of one request; times are of the monotonic clock, in seconds."""

    sent: float
    status: int = 0
    error: str | None = None  # the connection's, or the body of an error
    hung_up: bool = False
    tokens: list[float] = field(default_factory=list)  # of a stream: when each event with text came
    closing: float | None = None  # of a stream: when the scores came
    ended: float = 0.0
    complete: bool = False  # [DONE], or the whole body
    completion_tokens: int | None = None
    finish_reasons: list[str] = field(default_factory=list)
    uncertainties: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From request to end."""
        return self.ended - self.sent

    @property
    def first_token(self) -> float:
        """Seconds to the first token."""
        return self.tokens[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next."""
        return [later - earlier for earlier, later in zip(self.tokens, self.tokens[1:], strict=False)]


class Client:
    """Asks one server, as many requests at a time as one likes."""

    def __init__(self, base_url: str, headers: Mapping[str, str]) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(
            base_url=base_url, headers=dict(headers), limits=limits, timeout=None, trust_env=False
        )

    async def ask(self, body: Mapping[str, Any] | bytes, *, hang_up_after: float | None = None) -> Reply:
        """One request to the end, or until the client hangs up ``hang_up_after`` seconds later."""
        reply = Reply(sent=time.monotonic())
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            async with asyncio.timeout(hang_up_after):
                await self._exchange(content, reply)
        except TimeoutError:
            reply.hung_up = True
        except httpx.HTTPError as error:
            reply.error = repr(error)
        reply.ended = time.monotonic()
        return reply

    async def health(self) -> str:
        """The scorer's status."""
        response = await self._http.get("/v1/uncertainty/health")
        return str(response.json()["status"])

    async def until_ready(self, seconds: float = 900.0) -> None:
        """Wait for the scorer.

        Raises:
            RuntimeError: it is not ready in time.
        """
        deadline = time.monotonic() + seconds
        while (status := await self.health()) != "ready":
            if time.monotonic() > deadline:
                raise RuntimeError(f"the scorer is still {status} after {seconds:g} s")
            await asyncio.sleep(0.05)

    async def text(self, path: str) -> str:
        """Whatever stands at a path."""
        response = await self._http.get(path)
        response.raise_for_status()
        return response.text

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def _exchange(self, content: bytes, reply: Reply) -> None:
        headers = {"content-type": "application/json"}
        async with self._http.stream("POST", CHAT, content=content, headers=headers) as response:
            reply.status = response.status_code
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                await _read_stream(response, reply)
            else:
                _read_whole(await response.aread(), reply)


@asynccontextmanager
async def client_of(base_url: str, headers: Mapping[str, str]) -> AsyncIterator[Client]:
    """A client for the length of a block."""
    client = Client(base_url, headers)
    try:
        yield client
    finally:
        await client.close()


async def _read_stream(response: httpx.Response, reply: Reply) -> None:
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        now, data = time.monotonic(), line.removeprefix("data: ")
        if data == "[DONE]":
            reply.complete = True
            continue
        event = json.loads(data)
        if "error" in event:
            reply.error = data
            continue
        if event.get("usage"):
            reply.completion_tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            if "uncertainty" in choice:
                reply.closing = now
                reply.uncertainties.append(choice["uncertainty"])
            elif choice["delta"].get("content"):
                reply.tokens.append(now)
            if choice.get("finish_reason"):
                reply.finish_reasons.append(choice["finish_reason"])


def _read_whole(body: bytes, reply: Reply) -> None:
    if reply.status != httpx.codes.OK:
        reply.error = body.decode(errors="replace")
        return
    response = json.loads(body)
    reply.complete = True
    reply.completion_tokens = response["usage"]["completion_tokens"]
    for choice in response["choices"]:
        reply.finish_reasons.append(choice["finish_reason"])
        if "uncertainty" in choice:
            reply.uncertainties.append(choice["uncertainty"])
