"""How long a request may be, and ids that nobody can guess."""

import asyncio
import json
import random
import re

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from gnuq_serve.service.middleware import UncertaintyMiddleware
from gnuq_serve.service.requests.request_body import BodyTooLargeError, read_body
from gnuq_serve.service.routes import routes
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings.model import load_settings

LIMIT = 100


def read(chunks, *, announced=None, limit=LIMIT, whole=True):
    """What is read of a body in chunks, and how many of them were asked for."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if whole:
        messages[-1]["more_body"] = False
    asked = 0

    async def receive():
        nonlocal asked
        asked += 1
        return messages[asked - 1] if asked <= len(messages) else {"type": "http.disconnect"}

    headers = [] if announced is None else [(b"Content-Length", announced)]
    try:
        return asyncio.run(read_body({"type": "http", "headers": headers}, receive, limit)), asked
    except BodyTooLargeError as error:
        return error, asked


@pytest.mark.parametrize("announced", [None, b"100"])
def test_a_body_up_to_the_limit_is_read(announced):
    assert read([b"x" * 60, b"", b"y" * 40], announced=announced) == (b"x" * 60 + b"y" * 40, 3)


def test_an_announced_length_beyond_it_is_refused_unread():
    error, asked = read([b"x" * 101], announced=b"101")
    assert "more than 100 bytes (max_body_bytes=100)" in str(error)
    assert asked == 0


def test_without_a_length_no_more_is_read_than_that():
    """Also where a wrong length was announced."""
    for announced in (None, b"5", b"-1", b"many"):
        error, asked = read([b"x" * 60, b"y" * 41, b"z", b"z"], announced=announced)
        assert isinstance(error, BodyTooLargeError)
        assert asked == 2


def test_a_client_that_hangs_up():
    assert read([b"x", b"y"], whole=False) == (None, 3)


@pytest.fixture
def call():
    """Requests to our middleware and routes before an application that echoes."""
    reached = []

    async def echo(request):
        reached.append(await request.body())
        return JSONResponse({"choices": []})

    service = UncertaintyService(load_settings().model_copy(update={"max_body_bytes": LIMIT}))
    paths = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize")
    app = Starlette(routes=[*routes(service), *(Route(path, echo, methods=["POST"]) for path in paths)])
    app.add_middleware(UncertaintyMiddleware, service=service)

    def call(path, content):
        async def go():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://s") as client:
                return await client.post(path, content=content)

        return asyncio.run(go())

    call.reached = reached
    return call


async def in_pieces(body):
    for start in range(0, len(body), 30):
        yield body[start : start + 30]


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/uncertainty"])
def test_a_long_request_is_a_clear_error(call, path, pieces):
    body = json.dumps({"model": "m", "prompt": "x" * LIMIT}).encode()
    response = call(path, in_pieces(body) if pieces else body)
    assert response.status_code == 413
    error = response.json()["error"]
    assert error["message"] == "the request's body has more than 100 bytes (max_body_bytes=100)"
    assert (error["type"], error["param"], error["code"]) == ("RequestEntityTooLargeError", None, 413)
    assert call.reached == []


@pytest.mark.parametrize("path", ["/v1/responses", "/tokenize"])
def test_what_is_not_read_here_has_no_limit(call, path):
    body = b"x" * (LIMIT + 1)
    assert call(path, body).status_code == 200
    assert call.reached == [body]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/uncertainty"])
def test_deep_json_breaks_nothing(path):
    service = UncertaintyService(load_settings())

    async def vllm(request):
        return JSONResponse({"error": "vLLM's own words"}, status_code=400)

    app = Starlette(routes=[*routes(service), Route("/v1/chat/completions", vllm, methods=["POST"])])
    app.add_middleware(UncertaintyMiddleware, service=service)

    async def go():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://s") as client:
            return await client.post(path, content=b'{"messages": ' + b"[" * 100_000)

    assert asyncio.run(go()).status_code == 400


def test_ids_are_random():
    """Not by the generator that a seed foretells."""
    service = UncertaintyService(load_settings())
    found = set()
    for _ in range(200):
        random.seed(0)
        found.update(one["id"] for one in asyncio.run(skip(service)))
    assert len(found) == 1000
    assert all(re.fullmatch(r"unc-[0-9a-f]{24}", one) for one in found)


async def skip(service):
    return service.skip(5, "no reason")
