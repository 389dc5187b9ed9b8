"""Our own routes. They stand behind vLLM's API key like every ``/v1`` route."""

from __future__ import annotations

import json
import logging
from http import HTTPStatus

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gnuq_serve.service import metrics
from gnuq_serve.service.given_answer import GivenAnswer
from gnuq_serve.service.hang_up import ClientGoneError, unless_gone
from gnuq_serve.service.middleware import bad_request
from gnuq_serve.service.request_plan import InvalidRequestError
from gnuq_serve.service.result_store import ResultStoreError
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.tokenize import tokenize_in

logger = logging.getLogger(__name__)

_ROUTE = "uncertainty"


def routes(service: UncertaintyService) -> list[Route]:
    """Health, results by id, and scores of given answers.

    * ``GET /v1/uncertainty/health``: 200 when answers can be scored, else 503; the body says more.
    * ``GET /v1/uncertainty/{id}``: the result; 202 while it is pending, 404 where the id is unknown.
    * ``POST /v1/uncertainty``: the uncertainty of an answer that the client gives.
    """

    async def health(_request: Request) -> JSONResponse:
        state = service.state
        return JSONResponse(msgspec.to_builtins(state), status_code=200 if state.status == "ready" else 503)

    async def result(request: Request) -> JSONResponse:
        result_id = request.path_params["id"]
        try:
            found = await service.result(result_id)
        except ResultStoreError as error:
            logger.error("%s", error)
            return _error("results can't be read: see the server's log", HTTPStatus.SERVICE_UNAVAILABLE)
        if found is None:
            return _error(f"no result with the id {result_id:.80}: unknown or forgotten", HTTPStatus.NOT_FOUND)
        return JSONResponse(found, status_code=202 if found["status"] == "pending" else 200)

    async def score(request: Request) -> Response:
        try:
            given = GivenAnswer.read(json.loads(await request.body()))
        except ClientDisconnect:
            return Response()
        except InvalidRequestError as error:
            return bad_request(str(error), "body")
        except ValueError:
            return bad_request("the body is no JSON", "body")
        try:
            found = await unless_gone(request.receive, _score(service, given, request.app))
        except ClientGoneError:
            return Response()
        except InvalidRequestError as error:
            return bad_request(str(error), "body")
        metrics.ANSWERS.labels(_ROUTE, found["status"]).inc()
        return JSONResponse(found, status_code=202 if found["status"] == "pending" else 200)

    return [
        Route("/v1/uncertainty/health", health, methods=["GET"]),
        Route("/v1/uncertainty/{id}", result, methods=["GET"]),
        Route("/v1/uncertainty", score, methods=["POST"]),
    ]


async def _score(service: UncertaintyService, given: GivenAnswer, app: object) -> dict[str, object]:
    if given.model is not None and given.model in service.server.adapters():
        (skipped,) = service.skip(1, "adapter not loaded: the scorer has the base model only")
        return skipped
    end_of_turn_ids = service.served.end_of_turn_ids if service.served is not None else ()
    answer = await given.answer(tokenize_in(app, given.model), end_of_turn_ids)  # type: ignore[arg-type]
    (found,) = await service.score([answer], given.options)
    return found


def _error(message: str, status: HTTPStatus) -> JSONResponse:
    error = {"message": message, "type": status.phrase.replace(" ", ""), "param": None, "code": status.value}
    return JSONResponse({"error": error}, status_code=status.value)
