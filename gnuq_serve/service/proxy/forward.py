"""Requests handed on to another server as they are, and its responses handed back: a plain ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress

import httpx
from starlette.types import Message, Receive, Scope, Send

from gnuq_serve.service.hang_up import ClientGoneError, unless_gone

RawHeaders = list[tuple[bytes, bytes]]

# They speak of one connection, not of the message (RFC 9110, section 7.6.1).
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)
# A response may take as long as it likes: the client has its own patience.
_TIMEOUTS = httpx.Timeout(None, connect=10.0).as_dict()


class Forwarder:
    """Hands HTTP requests on, body and response piece by piece. A client's hang-up ends the other request too."""

    def __init__(
        self, upstream: httpx.URL, transport: httpx.AsyncBaseTransport, read_here: Iterable[str] = ()
    ) -> None:
        """Describe the other server.

        Args:
            upstream: its URL; a path in it comes before each request's.
            transport: how it is reached.
            read_here: paths whose responses are read on the way: they must not be compressed.
        """
        self._upstream, self._transport, self._read_here = upstream, transport, frozenset(read_here)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection.

        Raises:
            httpx.TransportError: the other server can't be reached, or broke off.
        """
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003, "reason": "websockets are not forwarded"})
            return
        body = _Body(scope, receive)
        with suppress(ClientGoneError):
            await unless_gone(body.receive_after_it, self._exchange(self._request(scope, body), send))

    async def _exchange(self, request: httpx.Request, send: Send) -> None:
        response = await self._transport.handle_async_request(request)
        try:
            headers = [self._of_here(*header) for header in end_to_end(response.headers.raw)]
            await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            # Raw bytes, compressed as they are. What breaks here must break the client's connection too: it
            # would take half a response for a whole one.
            assert isinstance(response.stream, httpx.AsyncByteStream)
            async for part in response.stream:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await response.aclose()

    def _of_here(self, name: bytes, value: bytes) -> tuple[bytes, bytes]:
        # The other server knows itself by its own address: a redirect would lead past us.
        own = str(self._upstream).rstrip("/").encode()
        return (name, value.removeprefix(own) if name == b"location" else value)

    def _request(self, scope: Scope, body: _Body) -> httpx.Request:
        target = self._upstream.raw_path.rstrip(b"/") + scope["raw_path"]
        if scope["query_string"]:
            target += b"?" + scope["query_string"]
        left_out = {b"host", b"content-length", b"expect"}  # 100-continue is between the client and us
        added = [(b"host", self._upstream.netloc), *body.framing, *_asked_by(scope)]
        if scope["path"] in self._read_here:
            left_out.add(b"accept-encoding")
            added.append((b"accept-encoding", b"identity"))
        kept = [(name, value) for name, value in end_to_end(scope["headers"]) if name not in left_out]
        # The target goes out as the client wrote it: httpx would write some escapes in its own way.
        extensions = {"timeout": _TIMEOUTS, "target": target}
        return httpx.Request(
            scope["method"], self._upstream, headers=kept + added, stream=body, extensions=extensions
        )


class _Body(httpx.AsyncByteStream):
    """A request's body as it comes."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        self._read = asyncio.Event()
        given = dict(scope["headers"])
        self.framing: RawHeaders = []
        if b"transfer-encoding" in given:
            self.framing = [(b"transfer-encoding", b"chunked")]
        elif b"content-length" in given:
            self.framing = [(b"content-length", given[b"content-length"])]

    async def __aiter__(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            more = bool(message.get("more_body"))
            if message.get("body"):
                yield message["body"]
        self._read.set()

    async def receive_after_it(self) -> Message:
        """What comes on the connection once the body has been read."""
        await self._read.wait()
        return await self._receive()


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """The headers that a proxy hands on, in their order; names in lower case."""
    lower = [(name.lower(), value) for name, value in headers]
    named = {
        token.strip().lower() for name, value in lower if name == b"connection" for token in value.split(b",")
    }
    return [(name, value) for name, value in lower if name not in _HOP_BY_HOP | named]


def _asked_by(scope: Scope) -> RawHeaders:
    """Who asked for what, where no proxy before us has said so."""
    given = dict(scope["headers"])
    told = {
        b"x-forwarded-for": scope["client"][0].encode() if scope.get("client") else b"",
        b"x-forwarded-host": given.get(b"host", b""),
        b"x-forwarded-proto": scope["scheme"].encode(),
    }
    return [(name, value) for name, value in told.items() if value and name not in given]
