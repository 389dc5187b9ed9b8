"""Responses on their way out where nothing is held back: whole ones and streams, each with its scores."""

from __future__ import annotations

import json
import logging

from starlette.types import Message, Send

from gnuq_serve.service.hang_up import ClientGoneError
from gnuq_serve.service.http_messages import json_bytes
from gnuq_serve.service.responses.accounting import Accounting
from gnuq_serve.service.responses.response_edit import attach, read_answers
from gnuq_serve.service.responses.stream_edit import EventSplitter, StreamEditor
from gnuq_serve.service.responses.whole_response import WholeResponse

logger = logging.getLogger(__name__)


class AnnotatedWhole(WholeResponse):
    """Keeps a JSON response until it carries its scores. Other kinds of messages pass at once."""

    async def __call__(self, message: Message) -> None:
        """Take one message of the response."""
        if message["type"] in ("http.response.start", "http.response.body"):
            await super().__call__(message)
        else:
            await self._send(message)

    async def _finish(self, body: bytes) -> None:
        accounting = self._accounting
        try:
            response = json.loads(body)
            if response is None:  # the client has hung up; vLLM gave up the answer
                return
            answers = read_answers(accounting.plan, response, accounting.thinking_length)
            attach(accounting.plan, response, await accounting.of(answers), mirror=accounting.mirror)
            body = json_bytes(response)
        except ClientGoneError:
            return
        except Exception:
            logger.exception("a response could not be annotated; it goes out as vLLM made it")
        await self._out(body)


class AnnotatedStream:
    """Passes a stream's events on at once; the scores come between the last token and the usage."""

    def __init__(self, accounting: Accounting, send: Send) -> None:
        self._accounting = accounting
        self._send = send
        self._splitter = EventSplitter()
        self._editor = StreamEditor(accounting.plan)
        self._closed = False

    async def __call__(self, message: Message) -> None:
        """Take one message of the response."""
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        for event in self._splitter.feed(message.get("body", b"")):
            edited = self._editor.edit(event)
            self._begin()
            if self._editor.state == "finished" and not self._closed:
                self._closed = True
                if (closing := await self._closing_event()) is not None:
                    await self._pass_on(closing)
            if edited is not None:
                await self._pass_on(edited)
        if not message.get("more_body"):
            await self._send({"type": "http.response.body", "body": self._splitter.flush()})

    async def _pass_on(self, event: bytes) -> None:
        await self._send({"type": "http.response.body", "body": event, "more_body": True})

    def _begin(self) -> None:
        """Have the choices scored that have finished."""
        try:
            self._accounting.begin(self._editor.newly_finished(self._accounting.thinking_length))
        except Exception:
            logger.exception("a choice is not scored before the others have finished")

    async def _closing_event(self) -> bytes | None:
        accounting = self._accounting
        try:
            answers = self._editor.answers(accounting.thinking_length)
            uncertainties = await accounting.of(answers, self._editor.indexes)
            return self._editor.closing_event(uncertainties, mirror=accounting.mirror) if answers else None
        except ClientGoneError:
            return None
        except Exception:
            logger.exception("a stream could not be annotated; it ends as vLLM made it")
        return None
