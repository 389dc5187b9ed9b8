import asyncio
import json

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from gnuq_serve.service.middleware import UncertaintyMiddleware
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings import load_settings
from gnuq_serve.uncertainty import Uncertainty

CHAT = "/v1/chat/completions"
REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Grüße"}]}
SCORED = Uncertainty(status="scored", id="unc-1", tokens=2, log_probability=-0.75)


class StandInService:
    """What the middleware needs of the service."""

    def __init__(self, uncertainties=(SCORED,), error=None, mirror=False, adapters=()):
        self.settings = load_settings().model_copy(update={"mirror_in_logprobs": mirror})
        self.adapters = adapters
        self.uncertainties, self.error = list(uncertainties), error
        self.asked = []

    skip = UncertaintyService.skip

    async def score(self, answers):
        self.asked.append(answers)
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return self.uncertainties


class Served:
    """A Starlette application in vLLM's place, that remembers what reached it."""

    def __init__(self, answer, service=None):
        self.bodies, self.requests = [], []
        self.service = service or StandInService()

        async def endpoint(request):
            self.requests.append(request)
            self.bodies.append(await request.body())
            return answer

        paths = (CHAT, "/v1/completions", "/v1/responses", "/elsewhere")
        self.app = Starlette(routes=[Route(path, endpoint, methods=["GET", "POST"]) for path in paths])
        self.app.add_middleware(UncertaintyMiddleware, service=self.service)

    def call(self, *, path=CHAT, method="POST", content=None, **request):
        async def go():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                if content is None:
                    return await client.request(method, path, **({"json": REQUEST} | request))
                return await client.request(method, path, content=content, **request)

        return asyncio.run(go())


def vllm_response():
    return {
        "id": "chatcmpl-1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Grüße, 世界 \U0001f600", "tool_calls": []},
                "logprobs": {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -0.25}]},
                "token_ids": [7, 2],
            }
        ],
        "prompt_token_ids": [1, 5, 6],
    }


def count(name, **labels):
    return REGISTRY.get_sample_value(name, labels) or 0


def test_a_response_carries_its_uncertainty():
    served = Served(JSONResponse(vllm_response(), headers={"x-request-id": "r1"}))
    before = count("gnuq_answers_total", route="chat", status="scored")
    response = served.call()
    assert response.status_code == 200
    assert int(response.headers["content-length"]) == len(response.content)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == "r1"
    expected = vllm_response() | {"prompt_token_ids": None}
    expected["choices"][0] |= {"token_ids": None, "logprobs": None, "uncertainty": SCORED.to_dict()}
    assert response.json() == expected
    (asked,) = served.service.asked
    assert (asked[0].prompt_ids, asked[0].answer_ids, asked[0].log_probability) == ([1, 5, 6], [7, 2], -0.75)
    assert count("gnuq_answers_total", route="chat", status="scored") == before + 1


def test_vllm_is_asked_for_token_ids_with_the_right_length():
    served = Served(JSONResponse(vllm_response()))
    served.call(json=REQUEST | {"uncertainty": {"mode": "exact"}})
    assert json.loads(served.bodies[0]) == REQUEST | {"return_token_ids": True, "logprobs": True}
    assert served.requests[0].headers.getlist("content-length") == [str(len(served.bodies[0]))]


def test_text_completions():
    response = vllm_response()
    response["choices"][0] = {
        "index": 0,
        "text": "x",
        "logprobs": None,
        "token_ids": [7],
        "prompt_token_ids": [1],
    }
    served = Served(JSONResponse(response), StandInService(mirror=True))
    answer = served.call(path="/v1/completions", json={"model": "m", "prompt": "Hi"}).json()
    assert answer["choices"][0]["uncertainty"] == SCORED.to_dict()
    assert answer["choices"][0]["logprobs"]["uncertainty"] == SCORED.to_dict()
    assert json.loads(served.bodies[0])["logprobs"] == 0


def test_under_a_root_path():
    served = Served(JSONResponse(vllm_response()))

    async def go():
        transport = httpx.ASGITransport(served.app, root_path="/api")
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post("/api" + CHAT, json=REQUEST)

    assert "uncertainty" in asyncio.run(go()).json()["choices"][0]


@pytest.mark.parametrize("content", [b"", b"{not json", b"\xff\xfe\x00", b"[1, 2]", b'"text"', b"null", b"7"])
def test_a_body_that_is_no_json_object_is_vllms_business(content):
    served = Served(JSONResponse({"error": "no"}, status_code=400))
    response = served.call(content=content, headers={"content-type": "application/json"})
    assert served.bodies == [content]
    assert response.status_code == 400
    assert response.content == b'{"error":"no"}'


@pytest.mark.parametrize("status", [400, 401, 404, 500, 503])
def test_error_responses_stay_as_they_are(status):
    served = Served(Response(b'{ "error":  {"message": "x"} }', status, media_type="application/json"))
    response = served.call()
    assert (response.status_code, response.content) == (status, b'{ "error":  {"message": "x"} }')
    assert served.service.asked == []


def test_a_successful_response_that_is_not_json_passes():
    served = Served(PlainTextResponse("fine"))
    assert served.call().content == b"fine"
    assert served.service.asked == []


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/responses"), ("POST", "/elsewhere"), ("GET", CHAT), ("GET", "/elsewhere")]
)
def test_other_routes_and_methods_are_untouched(method, path):
    body = json.dumps(vllm_response(), indent=2).encode()
    served = Served(Response(body, media_type="application/json"))
    sent = b'{"uncertainty": "odd",  "stream":true}'
    assert served.call(method=method, path=path, content=sent).content == body
    assert served.bodies == [sent]
    assert served.service.asked == []


def test_opt_out_gives_vllms_own_bytes():
    body = json.dumps(vllm_response(), indent=1).encode()
    served = Served(Response(body, media_type="application/json"))
    before = count("gnuq_unscored_requests_total", route="chat", reason="off")
    response = served.call(json=REQUEST | {"uncertainty": False})
    assert response.content == body
    assert json.loads(served.bodies[0]) == REQUEST
    assert served.requests[0].headers["content-length"] == str(len(served.bodies[0]))
    assert served.service.asked == []
    assert count("gnuq_unscored_requests_total", route="chat", reason="off") == before + 1


@pytest.mark.parametrize("value", ["yes", 1, {"mode": "fast"}, {"wait": False}, {"color": 1}])
def test_a_wrong_field_is_refused_in_openais_shape(value):
    served = Served(JSONResponse(vllm_response()))
    response = served.call(json=REQUEST | {"uncertainty": value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"].startswith("uncertainty")
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", "uncertainty", 400)
    assert served.bodies == []


def test_when_scoring_breaks_vllms_response_goes_out(caplog):
    body = json.dumps(vllm_response()).encode()
    served = Served(Response(body, media_type="application/json"), StandInService(error=RuntimeError("boom")))
    response = served.call()
    assert (response.status_code, response.content) == (200, body)
    assert int(response.headers["content-length"]) == len(body)
    assert "boom" in caplog.text


@pytest.mark.parametrize("body", [b"not json", b'{"choices": null}', b"{}", b"[]"])
def test_a_response_of_another_shape_goes_out_as_it_is(body):
    served = Served(Response(body, media_type="application/json"))
    assert served.call().content == body


def test_a_number_that_is_not_json_never_leaves():
    odd = SCORED.replace(entropy=float("nan"))
    body = json.dumps(vllm_response()).encode()
    served = Served(Response(body, media_type="application/json"), StandInService([odd]))
    assert served.call().content == body


def test_what_is_skipped_is_not_scored_but_says_so():
    served = Served(JSONResponse(vllm_response()))
    before = count("gnuq_answers_total", route="chat", status="skipped")
    asked = REQUEST | {"include_reasoning": False, "logprobs": True, "return_token_ids": True}
    answer = served.call(json=asked).json()
    uncertainty = answer["choices"][0].pop("uncertainty")
    assert uncertainty["status"] == "skipped"
    assert "include_reasoning" in uncertainty["reason"]
    assert answer == vllm_response()  # logprobs and token ids were the client's own wish
    assert json.loads(served.bodies[0]) == asked
    assert served.service.asked == []
    assert count("gnuq_answers_total", route="chat", status="skipped") == before + 1


def test_adapters_are_known_at_the_time_of_the_request():
    served = Served(JSONResponse(vllm_response()), StandInService(adapters={"lora-a": object()}))
    (adapted,), (base,) = (
        served.call(json=REQUEST | more).json()["choices"] for more in ({"model": "lora-a"}, {})
    )
    assert (adapted["uncertainty"]["status"], base["uncertainty"]["status"]) == ("skipped", "scored")


# From here on by ASGI messages: what passes, and when.


def scope(path=CHAT, headers=()):
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), *headers],
    }


def request_messages(body, chunks=1):
    size = -(-len(body) // chunks)
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return [
        {"type": "http.request", "body": part, "more_body": i < len(parts) - 1} for i, part in enumerate(parts)
    ]


def through(app, received, service=None, path=CHAT, headers=()):
    """Run one connection; what the client gets. After the given messages ``receive`` reports a disconnect."""
    sent, waiting = [], iter(received)

    async def receive():
        return next(waiting, {"type": "http.disconnect"})

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


@pytest.mark.parametrize("field", [{}, {"uncertainty": True}])
def test_a_stream_passes_event_by_event(field):
    sent, seen_by_app = [], []

    async def events():
        for i in range(3):
            seen_by_app.append(len(sent))
            yield f"data: {i}\n\n"

    async def app(scope, receive, send):
        assert "uncertainty" not in json.loads((await receive())["body"])
        await StreamingResponse(events(), media_type="text/event-stream")(scope, receive, send)

    async def go():
        messages = iter(request_messages(json.dumps(REQUEST | {"stream": True} | field).encode()))

        async def receive():
            if (message := next(messages, None)) is None:
                await asyncio.Event().wait()
            return message

        async def send(message):
            sent.append(message)

        service = StandInService()
        await UncertaintyMiddleware(app, service)(scope(), receive, send)
        return service

    before = count("gnuq_unscored_requests_total", route="chat", reason="stream")
    assert asyncio.run(go()).asked == []
    assert seen_by_app == [1, 2, 3]  # the start, then each event had gone out when the next was made
    assert b"".join(message.get("body", b"") for message in sent) == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
    assert count("gnuq_unscored_requests_total", route="chat", reason="stream") == before + 1


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
