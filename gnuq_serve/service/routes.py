"""Our own routes. They stand behind vLLM's API key like every ``/v1`` route."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from gnuq_serve.service.service import UncertaintyService


def routes(service: UncertaintyService) -> list[Route]:
    """``GET /v1/uncertainty/health``: 200 when answers can be scored, else 503; the body says more."""

    async def health(_request: Request) -> JSONResponse:
        state = service.state
        return JSONResponse(msgspec.to_builtins(state), status_code=200 if state.status == "ready" else 503)

    return [Route("/v1/uncertainty/health", health, methods=["GET"])]
