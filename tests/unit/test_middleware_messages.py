"""The middleware by ASGI messages: bodies in chunks, lengths, clients that hang up, other connections."""

import asyncio
import json

import pytest
from given_scores import CHAT, REQUEST, SCORED, StandInService, count, scope, vllm_response
from starlette.responses import JSONResponse

from gnuq_serve.service.middleware import UncertaintyMiddleware


def request_messages(body, chunks=1):
    size = -(-len(body) // chunks)
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return [
        {"type": "http.request", "body": part, "more_body": i < len(parts) - 1} for i, part in enumerate(parts)
    ]


def through(app, received, service=None, path=CHAT, headers=()):
    """Run one connection; what the client gets. It hangs up after what it was to send."""
    sent, waiting = [], iter(received)

    async def receive():
        if (message := next(waiting, None)) is not None:
            return message
        await asyncio.sleep(0.05 if sent or not received else 0)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    middleware = UncertaintyMiddleware(app, service or StandInService())
    asyncio.run(middleware(scope(path, headers), receive, send))
    return sent


def json_app(chunks, content_type=b"application/json"):
    async def app(scope, receive, send):
        await receive()
        length = str(sum(map(len, chunks))).encode()
        headers = [(b"content-type", content_type), (b"Content-Length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for i, chunk in enumerate(chunks):
            await send({"type": "http.response.body", "body": chunk, "more_body": i < len(chunks) - 1})

    return app


@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_bodies_in_several_chunks(chunks):
    body = json.dumps(vllm_response(), ensure_ascii=False).encode()
    size = -(-len(body) // chunks)
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    request = request_messages(json.dumps(REQUEST, ensure_ascii=False).encode(), chunks)
    start, whole = through(json_app(parts, b"application/json; charset=utf-8"), request)
    assert json.loads(whole["body"])["choices"][0]["uncertainty"] == SCORED.to_dict()
    lengths = [value for name, value in start["headers"] if name.lower() == b"content-length"]
    assert lengths == [str(len(whole["body"])).encode()]
    assert not whole.get("more_body")


def test_a_response_whose_last_chunk_is_empty():
    body = json.dumps(vllm_response()).encode()
    _, whole = through(json_app([body, b""]), request_messages(json.dumps(REQUEST).encode()))
    assert json.loads(whole["body"])["choices"][0]["uncertainty"] == SCORED.to_dict()


def test_a_chunked_request_gets_one_length():
    seen = []

    async def app(scope, receive, send):
        seen.append((scope["headers"], await receive()))
        await JSONResponse(vllm_response())(scope, receive, send)

    through(app, request_messages(json.dumps(REQUEST).encode(), 3), headers=[(b"Transfer-Encoding", b"chunked")])
    ((headers, message),) = seen
    names = [name.lower() for name, _ in headers]
    assert b"transfer-encoding" not in names
    assert names.count(b"content-length") == 1
    assert dict(headers)[b"content-length"] == str(len(message["body"])).encode()


def test_a_client_that_hangs_up_before_the_body_is_whole():
    reached = []

    async def app(scope, receive, send):
        reached.append(scope)

    first = {"type": "http.request", "body": b'{"model": "m', "more_body": True}
    assert through(app, [first]) == []
    assert through(app, []) == []
    assert reached == []


@pytest.mark.parametrize(
    "body", [REQUEST, REQUEST | {"stream": True}, REQUEST | {"uncertainty": False}, "no object"], ids=str
)
def test_a_disconnect_after_the_body_reaches_the_app(body):
    received = []

    async def app(scope, receive, send):
        received.extend([await receive(), await receive()])

    through(app, request_messages(json.dumps(body).encode()))
    assert [message["type"] for message in received] == ["http.request", "http.disconnect"]
    assert received[0]["more_body"] is False


def test_an_answer_that_vllm_gave_up_is_no_error(caplog):
    """It answers null to a client that has hung up."""
    before = count("gnuq_unscored_requests_total", route="chat", reason="incomplete")
    assert through(json_app([b"null"]), request_messages(json.dumps(REQUEST).encode())) == []
    assert caplog.text == ""
    assert count("gnuq_unscored_requests_total", route="chat", reason="incomplete") == before + 1


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
def test_other_connections_pass(kind):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(UncertaintyMiddleware(app, StandInService())({"type": kind, "path": CHAT}, None, None))
    assert seen == [kind]


def test_an_error_in_the_app_is_the_apps():
    async def app(scope, receive, send):
        raise KeyError("vLLM's own")

    with pytest.raises(KeyError, match="vLLM's own"):
        through(app, request_messages(json.dumps(REQUEST).encode()))
