"""The server behind the proxy, and what it tells of itself."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import Any

import httpx
import msgspec

from gnuq_serve.service.scorer.engine_load import WAITING

logger = logging.getLogger(__name__)

REFUSED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_ASK_AGAIN_SECONDS = 1.0
_REMIND_SECONDS = 30


class UpstreamError(RuntimeError):
    """The upstream server can't be worked with; the message says why and what helps."""


class UpstreamBusyError(UpstreamError):
    """It answers that it can't answer yet."""


class Model(msgspec.Struct, frozen=True):
    """One entry of ``/v1/models``."""

    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[Model]


class Upstream:
    """The upstream server; its connections are kept alive."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Describe the server.

        Args:
            url: where it answers; a path in it comes before each request's.
            api_key: what we ask with for ourselves. Clients' requests carry their own.

        Raises:
            UpstreamError: the URL is none.
        """
        try:
            self.url = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise UpstreamError(f"--upstream {url}: {error}") from error
        if self.url.scheme not in ("http", "https") or not self.url.host:
            raise UpstreamError(
                f"--upstream {url}: give an http:// or https:// URL, such as http://127.0.0.1:8000"
            )
        # Below uvicorn's default of 5 s, so that we close idle connections first: a request that meets a closing
        # one would be lost.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=4.0)
        # The environment's proxies are for the way out, not for a server of one's own.
        self.transport = httpx.AsyncHTTPTransport(limits=limits, trust_env=False)
        self._client = httpx.AsyncClient(
            transport=self.transport,
            base_url=self.url,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=10.0,
            trust_env=False,
        )
        self._base_names: frozenset[str] = frozenset()
        self._waiting: float | None = None

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()

    async def wait(self) -> list[Model]:
        """Its models, once it can tell.

        Raises:
            UpstreamError: it refuses the key, or answers what no server of this kind does.
        """
        waited = 0.0
        while True:
            try:
                return await self.models()
            except (httpx.TransportError, UpstreamBusyError) as error:
                if waited % _REMIND_SECONDS == 0:
                    logger.info("waiting for the upstream server %s: %s", self.url, error or type(error).__name__)
            await asyncio.sleep(_ASK_AGAIN_SECONDS)
            waited += _ASK_AGAIN_SECONDS

    async def models(self) -> list[Model]:
        """Its models and adapters.

        Raises:
            httpx.TransportError: it can't be reached.
            UpstreamBusyError: it can't tell now.
            UpstreamError: it refuses the key, or answers what no server of this kind does.
        """
        response = await self._client.get("v1/models")
        if response.status_code in REFUSED:
            raise UpstreamError(f"{self.url} wants an API key for /v1/models: give --upstream-api-key")
        if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:  # of what stands before one that still loads
            raise UpstreamBusyError(f"HTTP {response.status_code}")
        try:
            models = msgspec.json.decode(response.content, type=_Models).data
        except msgspec.MsgspecError:
            models = []
        if response.status_code != HTTPStatus.OK or not models:
            raise UpstreamError(f"{self.url} lists no models at /v1/models (HTTP {response.status_code})")
        self._base_names = frozenset(model.id for model in models if model.parent is None)
        return models

    async def watch(self, seconds: float = 30.0) -> None:
        """Ask for its models again and again: names come and go. Never returns."""
        roots: set[str | None] = set()
        while True:
            try:
                models = await self.models()
            except (httpx.TransportError, UpstreamError) as error:
                logger.warning("the upstream server's models can't be read: %s", error or type(error).__name__)
            else:
                found = {model.root for model in models if model.parent is None}
                if roots and found != roots:
                    logger.error(
                        "the upstream server now serves %s instead of %s: restart the proxy", found, roots
                    )
                roots = found
            await asyncio.sleep(seconds)

    async def watch_load(self, seconds: float = 0.5) -> None:
        """Ask for the number of its waiting requests again and again. Never returns."""
        while True:
            self._waiting = read_waiting(await self.metrics() or "")
            await asyncio.sleep(seconds)

    def waiting(self) -> float | None:
        """Requests that waited in its engines when ``watch_load`` last looked; None: not known."""
        return self._waiting

    def adapters(self) -> Adapters:
        """Names of adapters: every name that is not the base model's, since adapters come and go."""
        return Adapters(self._base_names)

    async def check_key(self, authorization: bytes | None) -> httpx.Response:
        """How it answers a client with this ``Authorization``.

        Raises:
            httpx.TransportError: it can't be reached.
        """
        headers = [] if authorization is None else [(b"authorization", authorization)]
        url = self.url.copy_with(raw_path=self.url.raw_path.rstrip(b"/") + b"/v1/models")
        return await self._client.send(httpx.Request("GET", url, headers=headers))  # without our own key

    async def metrics(self) -> str | None:
        """Its ``/metrics`` in Prometheus' text format; None where it gives none."""
        try:
            response = await self._client.get("metrics", headers={"accept": "text/plain"})
        except httpx.TransportError as error:
            logger.warning("the upstream server's metrics can't be read: %r", error)
            return None
        return response.text if response.status_code == HTTPStatus.OK else None


def read_waiting(metrics: str) -> float | None:
    """Waiting requests by vLLM's metrics, all engines together; None where they are not there."""
    values = [
        float(line.rpartition(" ")[2])
        for line in metrics.splitlines()
        if line.startswith((f"{WAITING}{{", f"{WAITING} "))
    ]
    return sum(values) if values else None


class Adapters:
    """A collection by what is not in it; see ``Upstream.adapters``."""

    def __init__(self, base_names: frozenset[str]) -> None:
        self._base_names = base_names

    def __contains__(self, name: Any) -> bool:
        return name not in self._base_names
