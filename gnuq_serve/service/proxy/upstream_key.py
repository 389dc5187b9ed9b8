"""The upstream server's API key, asked for on the routes that are answered or read here."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from http import HTTPStatus

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from gnuq_serve.service.proxy.forward import end_to_end
from gnuq_serve.service.proxy.upstream import REFUSED, Upstream
from gnuq_serve.service.requests.request_plan import ROUTES

OUR_PREFIX = "/v1/uncertainty"

_BELIEVED_SECONDS = 30.0
_MOST_BELIEVED = 1000


class UpstreamKey:
    """Lets through whom the upstream server lets see ``GET /v1/models``; its refusal goes to the client as it is.

    What is only handed on needs none of this. A key that was accepted is believed for half a minute.
    """

    def __init__(self, app: ASGIApp, upstream: Upstream, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._upstream, self._clock = app, upstream, clock
        self._believed: dict[bytes, float] = {}  # SHA-256 of the header -> until when

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        ours = scope["type"] == "http" and scope["path"].startswith(OUR_PREFIX)
        read = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in ROUTES
        refusal = await self._refusal(scope) if ours or read else None
        # Whatever else is wrong with the upstream server, of an answer it shall say so itself.
        if refusal is None or (read and refusal.status_code not in REFUSED):
            await self._app(scope, receive, send)
            return
        headers = end_to_end(refusal.headers.raw)
        await send({"type": "http.response.start", "status": refusal.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": refusal.content})

    async def _refusal(self, scope: Scope) -> httpx.Response | None:
        authorization = next((value for name, value in scope["headers"] if name == b"authorization"), None)
        key, now = hashlib.sha256(authorization or b"").digest(), self._clock()
        if self._believed.get(key, now) > now:
            return None
        response = await self._upstream.check_key(authorization)
        if response.status_code != HTTPStatus.OK:
            self._believed.pop(key, None)
            return response
        if len(self._believed) >= _MOST_BELIEVED:
            self._believed.clear()
        self._believed[key] = now + _BELIEVED_SECONDS
        return None
