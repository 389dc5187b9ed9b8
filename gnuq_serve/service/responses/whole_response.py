"""A JSON response that is read whole before anything of it goes out."""

from __future__ import annotations

from abc import ABC, abstractmethod

from starlette.types import Message, Send

from gnuq_serve.service.http_messages import with_length
from gnuq_serve.service.responses.accounting import Accounting


class WholeResponse(ABC):
    """Collects a response; what becomes of it is said in ``_finish``. Messages of unknown types are dropped."""

    def __init__(self, accounting: Accounting, send: Send) -> None:
        self._accounting = accounting
        self._send = send
        self._start: Message = {}
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        """Take one message of the response."""
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._finish(bytes(self._body))

    @abstractmethod
    async def _finish(self, body: bytes) -> None:
        """Send what goes out in the place of the whole body; nothing where the client is gone."""

    async def _out(self, body: bytes) -> None:
        headers = with_length(self._start["headers"], len(body))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})
