"""Small parts of HTTP that several places need: headers, and errors in the shape that OpenAI clients expect."""

from __future__ import annotations

import json
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Message, Receive


def error_response(status: HTTPStatus, message: str, parameter: str | None = None) -> JSONResponse:
    """An error in OpenAI's shape."""
    return JSONResponse({"error": error_object(status, message, parameter)}, status_code=status.value)


def error_object(status: HTTPStatus, message: str, parameter: str | None = None) -> dict[str, Any]:
    """What stands under ``error``."""
    kind = status.phrase.title().replace(" ", "").removesuffix("Error") + "Error"
    return {"message": message, "type": kind, "param": parameter, "code": status.value}


def bad_request(message: str, parameter: str = "uncertainty") -> JSONResponse:
    """A 400 in the shape that OpenAI clients expect."""
    return error_response(HTTPStatus.BAD_REQUEST, message, parameter)


def with_length(headers: Iterable[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    """Headers of a body that is ``length`` bytes long, and sent in one piece."""
    kept = [
        (name, value) for name, value in headers if name.lower() not in (b"content-length", b"transfer-encoding")
    ]
    return [*kept, (b"content-length", str(length).encode())]


def is_of(start: Message, media_type: bytes) -> bool:
    """Whether a response's body is of this type."""
    types = [value for name, value in start["headers"] if name.lower() == b"content-type"]
    return any(value.startswith(media_type) for value in types)


def json_bytes(data: dict[str, Any]) -> bytes:
    """Compact JSON.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def replay(body: bytes, receive: Receive) -> Receive:
    """The body once, then whatever comes (a disconnect must still reach vLLM, so that it stops generating)."""
    sent = False

    async def once_more() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once_more
