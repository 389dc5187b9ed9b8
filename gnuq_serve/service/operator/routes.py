"""The operator's routes: switch, reload, labels, and what drift and audits say. They need a key of their own.

They stand behind vLLM's API key like every ``/v1`` route, and ask for ``operator_key`` besides, in the header
``X-Gnuq-Operator-Key``: a chat client's key opens none of them.
"""

from __future__ import annotations

import dataclasses
import hmac
import json
import logging
import sqlite3
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gnuq_serve.service.operator.control import ControlError
from gnuq_serve.service.operator.label_store import LabelStoreError
from gnuq_serve.service.requests.request_body import BodyTooLargeError, read_body
from gnuq_serve.service.result_store import ResultStoreError
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings.sources import SettingsError

logger = logging.getLogger(__name__)

HEADER = "X-Gnuq-Operator-Key"

_Endpoint = Callable[[Request], Awaitable[Response]]


class _RefusedError(ValueError):
    """The request can't be done as it is; the message says how it can."""


def operator_routes(service: UncertaintyService) -> list[Route]:
    """The operator's routes.

    * ``GET`` and ``POST /v1/uncertainty/switch`` ``{"scoring": false}``: stop and start scoring.
    * ``POST /v1/uncertainty/reload``: read settings, calibrations and policy again.
    * ``GET /v1/uncertainty/audits``: drift, and what the labels say of the promises.
    * ``POST /v1/uncertainty/{id}/feedback`` ``{"correct": true}``: the label of an answer.
    """

    async def switch(request: Request) -> Response:
        control = service.rollout.control
        if request.method == "POST":
            body = await _body(request, service, {"scoring": bool})
            state = control.change(scoring=body["scoring"])
            logger.warning("scoring is switched %s", "on" if state.scoring else "off")
        return JSONResponse(msgspec.to_builtins(control.state))

    async def reload(_request: Request) -> Response:
        wants_restart = service.rollout.reload()
        logger.warning("settings were read again")
        calibrations = {name: one.id for name, one in service.decisions.calibrations.items()}
        return JSONResponse({"calibrations": calibrations, "wants_restart": wants_restart})

    async def audits(_request: Request) -> Response:
        rollout = service.rollout
        reports = [] if rollout.audits is None else await rollout.audits.reports()
        drift = {name: dataclasses.asdict(one) for name, one in rollout.drift.latest.items()}
        return JSONResponse({"drift": drift, "audits": [report.to_dict() for report in reports]})

    async def feedback(request: Request) -> Response:
        body = await _body(request, service, {"correct": bool}, {"index": int, "source": str})
        if body.get("source", "audit") not in ("audit", "user"):
            raise _RefusedError("source must be audit, or user: a label that somebody chose to give")
        if body.get("index", 0) != 0:
            raise _RefusedError("index: each choice has an id of its own, where its index is 0")
        answer_id = request.path_params["id"]
        volunteered = body.get("source") == "user"
        drawn = await service.rollout.label(answer_id, correct=body["correct"], volunteered=volunteered)
        if drawn is None:
            if (result := await service.result(answer_id)) is None:
                return unknown_id(answer_id)
            if result["status"] != "scored":
                raise _RefusedError(f"{answer_id} has no score: {result['status']}")
            await service.rollout.volunteer(result, correct=body["correct"])
        return JSONResponse(
            {"id": answer_id, "correct": body["correct"], "audit": bool(drawn) and not volunteered}
        )

    return [
        Route("/v1/uncertainty/switch", _guarded(service, switch), methods=["GET", "POST"]),
        Route("/v1/uncertainty/reload", _guarded(service, reload), methods=["POST"]),
        Route("/v1/uncertainty/audits", _guarded(service, audits), methods=["GET"]),
        Route("/v1/uncertainty/{id}/feedback", _guarded(service, feedback), methods=["POST"]),
    ]


def error_response(message: str, status: HTTPStatus) -> JSONResponse:
    """An error in the shape that OpenAI clients expect."""
    error = {"message": message, "type": status.phrase.replace(" ", ""), "param": None, "code": status.value}
    return JSONResponse({"error": error}, status_code=status.value)


def unknown_id(result_id: str) -> JSONResponse:
    """404 for a result that is not kept."""
    return error_response(f"no result with the id {result_id:.80}: unknown or forgotten", HTTPStatus.NOT_FOUND)


def _guarded(service: UncertaintyService, endpoint: _Endpoint) -> _Endpoint:
    """The endpoint behind the operator's key, its errors as responses."""

    async def guarded(request: Request) -> Response:
        key = service.settings.operator_key
        if key is None:
            return error_response("the operator's routes are off: set operator_key", HTTPStatus.FORBIDDEN)
        given = request.headers.get(HEADER, "").encode("latin-1")
        if not hmac.compare_digest(given, key.get_secret_value().encode()):
            return error_response(f"this needs the operator's key, in {HEADER}", HTTPStatus.FORBIDDEN)
        try:
            return await endpoint(request)
        except BodyTooLargeError as error:
            return error.response()
        except (_RefusedError, SettingsError) as error:
            return error_response(str(error), HTTPStatus.BAD_REQUEST)
        except LabelStoreError as error:
            logger.error("%s", error)
            return error_response(str(error), HTTPStatus.CONFLICT)
        except (ControlError, ResultStoreError, sqlite3.Error, OSError) as error:
            logger.error("%s", error)
            return error_response(str(error), HTTPStatus.SERVICE_UNAVAILABLE)

    return guarded


async def _body(
    request: Request,
    service: UncertaintyService,
    needed: dict[str, type],
    optional: dict[str, type] | None = None,
) -> dict[str, Any]:
    """The body, an object of these fields and no others."""
    read = await read_body(request.scope, request.receive, service.settings.max_body_bytes)
    known = {**needed, **(optional or {})}
    try:
        body = json.loads(read or b"")
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise _RefusedError(f"the body must be a JSON object with {', '.join(needed)}")
    for name, value in body.items():
        if name not in known:
            raise _RefusedError(f"{name:.80} is unknown here; known: {', '.join(known)}")
        if type(value) is not known[name]:
            kind = {bool: "true or false", int: "a whole number", str: "a text"}[known[name]]
            raise _RefusedError(f"{name} must be {kind}, not {value!r:.80}")
    if missing := [name for name in needed if name not in body]:
        raise _RefusedError(f"{', '.join(missing)} is missing")
    return body
