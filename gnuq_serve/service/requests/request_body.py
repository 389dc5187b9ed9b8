"""Reading a request's body, up to a limit."""

from __future__ import annotations

from http import HTTPStatus

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope


class BodyTooLargeError(ValueError):
    """The body has more bytes than ``max_body_bytes``."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request's body has more than {limit} bytes (max_body_bytes={limit})")

    def response(self) -> JSONResponse:
        """A 413 in the shape that OpenAI clients expect."""
        status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        error = {"message": str(self), "type": "RequestEntityTooLargeError", "param": None, "code": status.value}
        # The connection stays open: uvicorn drops what still comes, and the client can read this.
        return JSONResponse({"error": error}, status_code=status.value)


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The whole body; None where the client hung up before it was whole.

    Args:
        scope: the connection's.
        receive: the connection's.
        limit: most bytes.

    Raises:
        BodyTooLargeError: it has more; no more than that is read, and nothing where its length is announced.
    """
    for name, value in scope["headers"]:
        if name.lower() == b"content-length" and value.isdigit() and int(value) > limit:
            raise BodyTooLargeError(limit)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            raise BodyTooLargeError(limit)
        if not message.get("more_body"):
            return bytes(body)
