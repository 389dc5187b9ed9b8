"""The path of a request: plan it, let vLLM answer, score the answer, put the score in.

Plain ASGI, so that a streamed response is passed on event by event.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gnuq_serve.service.http_messages import bad_request, error_response, is_of, replay, with_length
from gnuq_serve.service.requests.request_body import BodyTooLargeError, read_body
from gnuq_serve.service.requests.request_plan import ROUTES, InvalidRequestError, plan_request
from gnuq_serve.service.requests.unscored_routes import OTHER, answering_route
from gnuq_serve.service.responses.accounting import Accounting
from gnuq_serve.service.responses.annotated_response import AnnotatedStream, AnnotatedWhole
from gnuq_serve.service.responses.gate import check_request
from gnuq_serve.service.responses.held_response import HeldStream, HeldUnknown, HeldWhole
from gnuq_serve.service.seeing import metrics
from gnuq_serve.service.seeing.observation import RequestContext
from gnuq_serve.service.service import UncertaintyService

_REFUSED = (
    "this route answers without an uncertainty, and this server lets no such answer through; use "
    "/v1/chat/completions or /v1/completions"
)


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
            await self._pass_by(scope, receive, send)
            return
        settings = self._service.settings
        try:
            body = await read_body(scope, receive, settings.max_body_bytes)
        except BodyTooLargeError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:  # the client hung up before the request was whole
            return
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            if settings.gates:  # vLLM may read what we can't
                await bad_request("the body is no JSON object", "body")(scope, receive, send)
                return
            # vLLM has its own words for that.
            await self._app(scope, replay(body, receive), send)
            return
        server = self._service.server
        try:
            plan = plan_request(
                route,
                request,
                server.adapters(),
                parses=server.parses(),
                not_now=self._service.rollout.not_now(),
                keep_text=self._service.settings.log_text,
                by_default=settings.score_by_default,
                adapter_path=server.adapter_path,
            )
            check_request(settings, plan)
            self._service.decisions.check_name(plan.options.calibration)
        except InvalidRequestError as error:
            await bad_request(str(error))(scope, receive, send)
            return
        if plan.body != request:
            body = json.dumps(plan.body).encode()
        scope = {**scope, "headers": with_length(scope["headers"], len(body))}
        if plan.unscored is not None:
            metrics.UNSCORED_REQUESTS.labels(route, plan.unscored).inc()
            await self._app(scope, replay(body, receive), send)
            return
        context = RequestContext.of(route, scope["headers"], request, server.sampling_defaults())
        accounting = Accounting(self._service, plan, receive, context)
        response = _Response(accounting, send)
        try:
            await self._app(scope, replay(body, receive), response)
        finally:
            accounting.end()
            if response.is_answer and not accounting.done:  # the client hung up, or vLLM broke off
                metrics.UNSCORED_REQUESTS.labels(route, "incomplete").inc()

    async def _pass_by(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A connection to another route: one that answers without a score is counted or refused."""
        settings = self._service.settings
        label = answering_route(scope, settings.silent_routes)
        blocks = settings.blocks_unscored_routes
        if label is not None and (blocks or label != OTHER):
            metrics.UNSCORED_REQUESTS.labels(label, "refused" if blocks else "route").inc()
        if label is None or not blocks:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()  # its connect
            await send({"type": "websocket.close", "code": 1008})
        else:
            await error_response(HTTPStatus.FORBIDDEN, _REFUSED)(scope, receive, send)


class _Response:
    """Hands a response on: a successful one as a whole or as a stream, each with its scores; others untouched."""

    def __init__(self, accounting: Accounting, send: Send) -> None:
        self._accounting = accounting
        self.is_answer = False
        self._send = send
        self._hand_on = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and (kind := self._kind(message)) is not None:
            self.is_answer = True
            self._hand_on = kind(self._accounting, self._send)
        await self._hand_on(message)

    def _kind(self, start: Message) -> Callable[[Accounting, Send], Send] | None:
        """How this response is handed on; None: as it is."""
        gates = self._accounting.settings.gates
        if start["status"] == HTTPStatus.OK and is_of(start, b"application/json"):
            return HeldWhole if gates else AnnotatedWhole
        if start["status"] == HTTPStatus.OK and is_of(start, b"text/event-stream"):
            return HeldStream if gates else AnnotatedStream
        return HeldUnknown if gates and start["status"] < HTTPStatus.BAD_REQUEST else None
