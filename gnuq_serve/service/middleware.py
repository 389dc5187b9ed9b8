"""The path of a request: plan it, let vLLM answer, score the answer, put the score in.

Plain ASGI, so that a streamed response is passed on event by event.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gnuq_serve.service import metrics
from gnuq_serve.service.answer import Answer
from gnuq_serve.service.hang_up import ClientGoneError, unless_gone
from gnuq_serve.service.request_plan import ROUTES, InvalidRequestError, RequestPlan, plan_request
from gnuq_serve.service.response_edit import attach, read_answers
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.stream_edit import EventSplitter, StreamEditor

logger = logging.getLogger(__name__)


class UncertaintyMiddleware:
    """Adds ``uncertainty`` to every choice of a chat or text completion."""

    def __init__(self, app: ASGIApp, service: UncertaintyService) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        route = None
        if scope["type"] == "http" and scope["method"] == "POST":
            route = ROUTES.get(scope["path"].removeprefix(scope.get("root_path", "")))
        if route is None:
            await self._app(scope, receive, send)
            return
        body = await _read_body(receive)
        if body is None:  # the client hung up before the request was whole
            return
        try:
            request = json.loads(body)
        except ValueError:
            request = None
        if not isinstance(request, dict):  # vLLM has its own words for that
            await self._app(scope, _replay(body, receive), send)
            return
        server = self._service.server
        try:
            plan = plan_request(route, request, server.adapters(), parses=server.parses())
        except InvalidRequestError as error:
            await bad_request(str(error))(scope, receive, send)
            return
        if plan.body != request:
            body = json.dumps(plan.body).encode()
        scope = {**scope, "headers": _with_length(scope["headers"], len(body))}
        if plan.unscored is not None:
            metrics.UNSCORED_REQUESTS.labels(route, plan.unscored).inc()
            await self._app(scope, _replay(body, receive), send)
            return
        accounting = _Accounting(self._service, plan, receive)
        response = _Response(accounting, send)
        try:
            await self._app(scope, _replay(body, receive), response)
        finally:
            if response.is_answer and not accounting.done:  # the client hung up, or vLLM broke off
                metrics.UNSCORED_REQUESTS.labels(route, "incomplete").inc()


class _Accounting:
    """Uncertainties for the answers of one request, counted."""

    def __init__(self, service: UncertaintyService, plan: RequestPlan, receive: Receive) -> None:
        self.plan = plan
        self.mirror = service.settings.mirror_in_logprobs
        self.thinking_length = service.server.thinking_length
        self.done = False
        self._service = service
        self._receive = receive

    async def of(self, answers: Sequence[Answer | None]) -> list[dict[str, Any]]:
        """One uncertainty for each answer.

        Raises:
            ClientGoneError: the client hung up, and scoring was given up.
        """
        if self.plan.skip is not None:
            results = self._service.skip(len(answers), self.plan.skip)
        else:
            with metrics.SECONDS.time():
                work = self._service.score(answers, self.plan.options)
                results = await unless_gone(self._receive, work)
        for result in results:
            metrics.ANSWERS.labels(self.plan.route, result["status"]).inc()
        self.done = True
        return results


class _Response:
    """Hands a response on: a successful one as a whole or as a stream, each with its scores; others untouched."""

    def __init__(self, accounting: _Accounting, send: Send) -> None:
        self._accounting = accounting
        self.is_answer = False
        self._send = send
        self._hand_on = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            for media_type, kind in ((b"application/json", _Whole), (b"text/event-stream", _Stream)):
                if message["status"] == 200 and _is_of(message, media_type):
                    self.is_answer = True
                    self._hand_on = kind(self._accounting, self._send)
        await self._hand_on(message)


class _Whole:
    """Holds back a JSON response until it carries its scores."""

    def __init__(self, accounting: _Accounting, send: Send) -> None:
        self._accounting = accounting
        self._send = send
        self._start: Message = {}
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._finish(bytes(self._body))
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
            body = _json(response)
        except ClientGoneError:
            return
        except Exception:
            logger.exception("a response could not be annotated; it goes out as vLLM made it")
        await self._send({**self._start, "headers": _with_length(self._start["headers"], len(body))})
        await self._send({"type": "http.response.body", "body": body})


class _Stream:
    """Passes a stream's events on at once; the scores come between the last token and the usage."""

    def __init__(self, accounting: _Accounting, send: Send) -> None:
        self._accounting = accounting
        self._send = send
        self._splitter = EventSplitter()
        self._editor = StreamEditor(accounting.plan)
        self._closed = False

    async def __call__(self, message: Message) -> None:
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        for event in self._splitter.feed(message.get("body", b"")):
            edited = self._editor.edit(event)
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

    async def _closing_event(self) -> bytes | None:
        accounting = self._accounting
        try:
            answers = self._editor.answers(accounting.thinking_length)
            uncertainties = await accounting.of(answers)
            return self._editor.closing_event(uncertainties, mirror=accounting.mirror) if answers else None
        except ClientGoneError:
            return None
        except Exception:
            logger.exception("a stream could not be annotated; it ends as vLLM made it")
        return None


async def _read_body(receive: Receive) -> bytes | None:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once, then whatever comes (a disconnect must still reach vLLM, so that it stops generating)."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_length(headers: Iterable[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [
        (name, value) for name, value in headers if name.lower() not in (b"content-length", b"transfer-encoding")
    ]
    return [*kept, (b"content-length", str(length).encode())]


def _is_of(start: Message, media_type: bytes) -> bool:
    types = [value for name, value in start["headers"] if name.lower() == b"content-type"]
    return any(value.startswith(media_type) for value in types)


def _json(response: dict[str, Any]) -> bytes:
    return json.dumps(response, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def bad_request(message: str, parameter: str = "uncertainty") -> JSONResponse:
    """A 400 in the shape that OpenAI clients expect."""
    error = {"message": message, "type": "BadRequestError", "param": parameter, "code": 400}
    return JSONResponse({"error": error}, status_code=400)
