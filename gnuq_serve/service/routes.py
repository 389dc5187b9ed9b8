"""Our own routes. They stand behind vLLM's API key like every ``/v1`` route."""

from __future__ import annotations

import dataclasses
import json
import logging
from http import HTTPStatus

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gnuq_serve.service.hang_up import ClientGoneError, unless_gone
from gnuq_serve.service.http_messages import bad_request
from gnuq_serve.service.operator.routes import error_response, operator_routes, unknown_id
from gnuq_serve.service.requests.given_answer import GivenAnswer
from gnuq_serve.service.requests.request_body import BodyTooLargeError, read_body
from gnuq_serve.service.requests.request_plan import ADAPTER_NOT_LOADED, InvalidRequestError
from gnuq_serve.service.requests.tokenize import tokenize_in
from gnuq_serve.service.result_store import ResultStoreError
from gnuq_serve.service.seeing.observation import RequestContext
from gnuq_serve.service.service import UncertaintyService

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
        load = service.load
        body = {
            **msgspec.to_builtins(state),
            "scoring": service.rollout.control.state.scoring,
            "waiting": load.waiting,
            "yielding": load.yielding,
        }
        return JSONResponse(body, status_code=200 if state.status == "ready" else 503)

    async def result(request: Request) -> JSONResponse:
        result_id = request.path_params["id"]
        try:
            found = await service.result(result_id)
        except ResultStoreError as error:
            logger.error("%s", error)
            return error_response("results can't be read: see the server's log", HTTPStatus.SERVICE_UNAVAILABLE)
        if found is None:
            return unknown_id(result_id)
        return JSONResponse(found, status_code=202 if found["status"] == "pending" else 200)

    async def score(request: Request) -> Response:
        try:
            body = await read_body(request.scope, request.receive, service.settings.max_body_bytes)
            if body is None:  # the client hung up
                return Response()
            given = GivenAnswer.read(json.loads(body))
            service.decisions.check_name(given.options.calibration)
        except BodyTooLargeError as error:
            return error.response()
        except InvalidRequestError as error:
            return bad_request(str(error), "body")
        except (ValueError, RecursionError):
            return bad_request("the body is no JSON", "body")
        try:
            found = await unless_gone(request.receive, _score(service, given, request))
        except ClientGoneError:
            return Response()
        except InvalidRequestError as error:
            return bad_request(str(error), "body")
        return JSONResponse(found, status_code=202 if found["status"] == "pending" else 200)

    return [
        *operator_routes(service),
        Route("/v1/uncertainty/health", health, methods=["GET"]),
        Route("/v1/uncertainty/{id}", result, methods=["GET"]),
        Route("/v1/uncertainty", score, methods=["POST"]),
    ]


async def _score(service: UncertaintyService, given: GivenAnswer, request: Request) -> dict[str, object]:
    context = RequestContext.of(_ROUTE, request.scope["headers"], given.body)
    adapter = None
    if given.model is not None and given.model in service.server.adapters():
        adapter = service.server.adapter_path(given.model)
        if adapter is None:
            (skipped,) = service.skip(1, ADAPTER_NOT_LOADED, given.options, context)
            return skipped
    end_of_turn_ids = service.served.end_of_turn_ids if service.served is not None else ()
    answer = await given.answer(
        tokenize_in(request.app, given.model, request.headers.get("authorization")), end_of_turn_ids
    )
    answer = dataclasses.replace(answer, adapter=adapter, text=given.text if service.settings.log_text else None)
    (found,) = await service.score([answer], given.options, context)
    return found
