"""The path of a request: plan it, let vLLM answer, score the answer, put the score in.

Plain ASGI, so that a streamed response is passed on event by event.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gnuq_serve.service import metrics
from gnuq_serve.service.request_plan import ROUTES, InvalidRequestError, RequestPlan, plan_request
from gnuq_serve.service.response_edit import attach, read_answers
from gnuq_serve.service.service import UncertaintyService

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
        try:
            plan = plan_request(route, request, self._service.adapters)
        except InvalidRequestError as error:
            await _bad_request(str(error))(scope, receive, send)
            return
        if plan.body != request:
            body = json.dumps(plan.body).encode()
        scope = {**scope, "headers": _with_length(scope["headers"], len(body))}
        if plan.unscored is not None:
            metrics.UNSCORED_REQUESTS.labels(route, plan.unscored).inc()
            await self._app(scope, _replay(body, receive), send)
            return
        await self._app(scope, _replay(body, receive), _Scoring(self._service, plan, send))


class _Scoring:
    """Holds back a successful JSON response until it carries its scores; anything else passes at once."""

    def __init__(self, service: UncertaintyService, plan: RequestPlan, send: Send) -> None:
        self._service = service
        self._plan = plan
        self._send = send
        self._start: Message | None = None
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_answer(message):
            self._start = message
        elif self._start is None or message["type"] != "http.response.body":
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._finish(self._start, bytes(self._body))

    async def _finish(self, start: Message, body: bytes) -> None:
        try:
            body = await self._scored(body)
        except Exception:
            logger.exception("a response could not be annotated; it goes out as vLLM made it")
        await self._send({**start, "headers": _with_length(start["headers"], len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def _scored(self, body: bytes) -> bytes:
        response: dict[str, Any] = json.loads(body)
        if self._plan.skip is not None:
            uncertainties = self._service.skip(len(response["choices"]), self._plan.skip)
        else:
            with metrics.SECONDS.time():
                uncertainties = await self._service.score(read_answers(self._plan, response))
        for uncertainty in uncertainties:
            metrics.ANSWERS.labels(self._plan.route, uncertainty.status).inc()
        attach(self._plan, response, uncertainties, mirror=self._service.settings.mirror_in_logprobs)
        return json.dumps(response, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


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


def _is_answer(start: Message) -> bool:
    types = [value for name, value in start["headers"] if name.lower() == b"content-type"]
    return start["status"] == 200 and any(value.startswith(b"application/json") for value in types)


def _bad_request(message: str) -> JSONResponse:
    error = {"message": message, "type": "BadRequestError", "param": "uncertainty", "code": 400}
    return JSONResponse({"error": error}, status_code=400)
