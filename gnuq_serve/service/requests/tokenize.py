"""Token ids by the server's own route ``/tokenize``: the same tokenizer and chat template as for its answers."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import httpx
from starlette.types import ASGIApp

from gnuq_serve.service.requests.given_answer import Tokenize, TokenizeError


def tokenize_in(app: ASGIApp, model: str | None, authorization: str | None = None) -> Tokenize:
    """Ask the application that we are part of.

    Args:
        app: vLLM's.
        model: the model or adapter that the client named.
        authorization: what the client sent; what stands before a server may want it on every route.
    """
    headers = {} if authorization is None else {"authorization": authorization}

    async def tokenize(body: dict[str, Any]) -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers) as client:
            return read_tokens(await client.post("/tokenize", json={**body, "model": model}))

    return tokenize


def read_tokens(response: httpx.Response) -> list[int]:
    """The token ids in a response of ``/tokenize``.

    Raises:
        TokenizeError: it reports an error.
    """
    if response.status_code == HTTPStatus.OK:
        tokens: list[int] = response.json()["tokens"]
        return tokens
    try:
        reason = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        reason = f"HTTP {response.status_code}"
    raise TokenizeError(f"the server's /tokenize refused the text: {reason}")
