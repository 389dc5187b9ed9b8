"""The sidecar: our routes and middleware in front of a vLLM server that knows nothing of us."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus

import httpx
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gnuq_serve.service.middleware import UncertaintyMiddleware
from gnuq_serve.service.proxy.forward import Forwarder
from gnuq_serve.service.proxy.upstream import Upstream
from gnuq_serve.service.proxy.upstream_key import UpstreamKey
from gnuq_serve.service.requests.request_plan import ROUTES
from gnuq_serve.service.routes import routes
from gnuq_serve.service.served import ServedModel, Server
from gnuq_serve.service.service import UncertaintyService

logger = logging.getLogger(__name__)


def proxy_app(service: UncertaintyService, upstream: Upstream, served: ServedModel, server: Server) -> Starlette:
    """The application; it starts and stops the service and closes the upstream's connections.

    Args:
        service: not started yet.
        upstream: the server behind us.
        served: what that server has loaded.
        server: what else there is to know of it.
    """

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        service.start(served, server)
        watching = [asyncio.create_task(upstream.watch())]
        if server.engine_load is not None:
            watching.append(asyncio.create_task(upstream.watch_load()))
        try:
            yield
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            await service.stop()
            await upstream.close()

    async def metrics(_request: Request) -> Response:
        theirs = await upstream.metrics()
        ours = generate_latest(_ours())
        return Response((theirs or "").encode() + ours, headers={"content-type": CONTENT_TYPE_LATEST})

    app = Starlette(
        routes=[*routes(service), Route("/metrics", metrics, methods=["GET"])],
        middleware=[
            Middleware(BadGateway),
            Middleware(UpstreamKey, upstream=upstream),
            Middleware(UncertaintyMiddleware, service=service),
        ],
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.router.default = Forwarder(upstream.url, upstream.transport, read_here=ROUTES)
    return app


class BadGateway:
    """Says so where the upstream server can't be reached; where it broke off, so does the connection."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except httpx.TransportError as error:
            if started:
                raise
            logger.error("the upstream server did not answer %s: %r", scope["path"], error)
            status = HTTPStatus.BAD_GATEWAY
            message = "the server behind this proxy did not answer"
            detail = {"message": message, "type": "BadGatewayError", "param": None, "code": status.value}
            await JSONResponse({"error": detail}, status_code=status)(scope, receive, send)


class _Ours(Collector):
    """Our own series; those of the Python process would clash with the upstream's."""

    def collect(self) -> Iterator[Metric]:
        return (metric for metric in REGISTRY.collect() if metric.name.startswith("gnuq_"))


def _ours() -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_Ours())
    return registry
