import asyncio
import hashlib
import json

import httpx
import pytest
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from gnuq_serve.service.middleware import UncertaintyMiddleware
from gnuq_serve.service.seeing.observation import Observers
from gnuq_serve.service.served import Server
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings.model import load_settings
from gnuq_serve.uncertainty import Uncertainty

CHAT = "/v1/chat/completions"
REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Grüße"}]}
SCORED = Uncertainty(status="scored", id="unc-1", tokens=2, log_probability=-0.75)


class StandInService(UncertaintyService):
    """A service whose scores are given."""

    def __init__(self, uncertainties=(SCORED,), error=None, mirror=False, adapters=()):
        super().__init__(load_settings().model_copy(update={"mirror_in_logprobs": mirror}))
        self.server = Server(adapters=lambda: adapters)
        self.uncertainties, self.error = [one.to_dict() for one in uncertainties], error
        self.asked, self.kept, self.given_up = [], [], 0
        self.observers, self.told, self.contexts = Observers(), [], []
        self.observers.append(self.told.append)
        self.ready = None  # an event to wait for
        self.was_asked = asyncio.Event()

    def _keep_soon(self, results):
        self.kept += results

    async def score(self, answers, options, context):
        self.asked.append(answers)
        self.contexts.append(context)
        self.was_asked.set()
        try:
            await (asyncio.sleep(0) if self.ready is None else self.ready.wait())
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if self.error is not None:
            raise self.error
        return self.uncertainties[: len(answers)]


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
    response = served.call(headers={"Authorization": "Bearer k", "Traceparent": "00-1-2-01"})
    assert response.status_code == 200
    assert int(response.headers["content-length"]) == len(response.content)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == "r1"
    expected = vllm_response() | {"prompt_token_ids": None}
    expected["choices"][0] |= {"token_ids": None, "logprobs": None, "uncertainty": SCORED.to_dict()}
    assert response.json() == expected
    (asked,) = served.service.asked
    span = asked[0].answer_span
    assert (span.prompt_ids, span.answer_ids, span.log_probability) == ([1, 5, 6], [7, 2], -0.75)
    (context,) = served.service.contexts
    assert (context.route, context.turns, context.trace_headers) == ("chat", 1, {"traceparent": "00-1-2-01"})
    assert context.api_key_hash == hashlib.sha256(b"k").hexdigest()


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


@pytest.mark.parametrize("value", ["yes", 1, {"mode": "fast"}, {"wait": 0}, {"color": 1}])
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


def test_an_answer_that_vllm_gave_up_is_no_error(caplog):
    """It answers null to a client that has hung up."""
    before = count("gnuq_unscored_requests_total", route="chat", reason="incomplete")
    assert through(json_app([b"null"]), request_messages(json.dumps(REQUEST).encode())) == []
    assert caplog.text == ""
    assert count("gnuq_unscored_requests_total", route="chat", reason="incomplete") == before + 1


@pytest.mark.parametrize("body", [b"not json", b'{"choices": null}', b"{}", b"[]"])
def test_a_response_of_another_shape_goes_out_as_it_is(body):
    served = Served(Response(body, media_type="application/json"))
    assert served.call().content == body


def test_a_number_that_is_not_json_never_leaves():
    odd = SCORED.replace(entropy=float("nan"))  # a bug; the client must not see it
    body = json.dumps(vllm_response()).encode()
    served = Served(Response(body, media_type="application/json"), StandInService([odd]))
    assert served.call().content == body


def test_what_is_skipped_is_not_scored_but_says_so():
    served = Served(JSONResponse(vllm_response()))
    tools = [{"type": "function", "function": {"name": "f"}}]
    asked = REQUEST | {"include_reasoning": False, "tools": tools, "logprobs": True, "return_token_ids": True}
    answer = served.call(json=asked).json()
    uncertainty = answer["choices"][0].pop("uncertainty")
    assert uncertainty["status"] == "skipped"
    assert [one["id"] for one in served.service.kept] == [uncertainty["id"]]
    assert "include_reasoning" in uncertainty["reason"]
    assert answer == vllm_response()  # logprobs and token ids were the client's own wish
    assert json.loads(served.bodies[0]) == asked
    assert served.service.asked == []
    (told,) = served.service.told
    assert (told.context.route, told.result["status"]) == ("chat", "skipped")


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


def chunk(content, *ids, finish_reason=None, **more):
    choice = {"index": 0, "delta": {"content": content}, "logprobs": None, "finish_reason": finish_reason}
    return {"id": "chatcmpl-1", "choices": [choice | {"token_ids": list(ids)}]} | more


def event(data):
    return f"data: {json.dumps(data)}\n\n".encode()


ROLE = {
    "id": "chatcmpl-1",
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None}],
    "prompt_token_ids": [1, 5],
}
USAGE = {"id": "chatcmpl-1", "choices": [], "usage": {"total_tokens": 4}}
EVENTS = [ROLE, chunk("Hi", 7), chunk("", 2, finish_reason="stop"), USAGE]


class Connection:
    """One streamed request whose client can hang up at any time."""

    def __init__(self, messages, service=None, body=REQUEST, listens=True):
        """``listens``: the application cancels itself when the client hangs up, as Starlette does."""
        self.sent, self.service, self.body = [], service or StandInService(), body
        self.messages, self.listens = messages, listens
        self.seen_by_app = []
        self.hung_up = None

    async def app(self, scope, receive, send):
        assert "uncertainty" not in json.loads((await receive())["body"])
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def stream():
            for data in self.messages:
                self.seen_by_app.append(len(self.sent))
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        if not self.listens:
            await stream()
            return
        streaming = asyncio.ensure_future(stream())
        listening = asyncio.ensure_future(receive())
        await asyncio.wait((streaming, listening), return_when=asyncio.FIRST_COMPLETED)
        for task in (streaming, listening):
            task.cancel()
        await asyncio.gather(streaming, listening, return_exceptions=True)

    async def run(self):
        self.hung_up = asyncio.Event()
        body = json.dumps(self.body | {"stream": True}).encode()
        request = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive():
            if (message := next(request, None)) is not None:
                return message
            await self.hung_up.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            self.sent.append(message)

        await UncertaintyMiddleware(self.app, self.service)(scope(), receive, send)

    @property
    def events(self):
        body = b"".join(message.get("body", b"") for message in self.sent)
        parts = body.decode().split("\n\n")
        assert parts.pop() == ""
        return [part if part[6:7] != "{" else json.loads(part.removeprefix("data: ")) for part in parts]


@pytest.mark.parametrize("field", [{}, {"uncertainty": True}])
def test_a_stream_passes_event_by_event_and_ends_with_its_score(field):
    connection = Connection([*map(event, EVENTS), b"data: [DONE]\n\n"], body=REQUEST | field)
    asyncio.run(connection.run())
    # the start, then each event had gone out when the next was made; with the usage went the score
    assert connection.seen_by_app == [1, 2, 3, 4, 6]
    *tokens, closing, usage, done = connection.events
    assert [event["choices"][0].get("token_ids") for event in tokens] == [None] * 3
    assert [event["choices"][0]["delta"]["content"] for event in tokens] == ["", "Hi", ""]
    assert tokens[0]["prompt_token_ids"] is None
    choice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": None, "uncertainty": SCORED.to_dict()}
    assert closing == {"id": "chatcmpl-1", "choices": [choice]}
    assert usage == USAGE
    assert done == "data: [DONE]"
    ((answer,),) = connection.service.asked
    assert (answer.prompt_ids, answer.answer_ids) == ([1, 5], [7, 2])
    assert not connection.sent[-1].get("more_body")


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_events_may_come_in_any_pieces(size):
    whole = b"".join([*map(event, EVENTS), b": keep-alive\n\n", b"data: [DONE]\n\n"])
    connection = Connection([whole[i : i + size] for i in range(0, len(whole), size)])
    asyncio.run(connection.run())
    events = connection.events
    assert [type(event) for event in events] == [dict] * 5 + [str] * 2
    assert events[3]["choices"][0]["uncertainty"]["status"] == "scored"
    assert events[5:] == [": keep-alive", "data: [DONE]"]


def test_a_stream_ends_in_order_when_scoring_breaks(caplog):
    service = StandInService(error=RuntimeError("boom"))
    connection = Connection([*map(event, EVENTS), b"data: [DONE]\n\n"], service)
    asyncio.run(connection.run())
    assert connection.events[3:] == [USAGE, "data: [DONE]"]
    assert "boom" in caplog.text


@pytest.mark.parametrize("broken", [{"error": {"message": "out"}}, {"neither": 1}, {"choices": [{"text": "x"}]}])
def test_after_an_error_the_stream_passes_as_it_is(broken):
    before = count("gnuq_unscored_requests_total", route="chat", reason="incomplete")
    connection = Connection([*map(event, [ROLE, chunk("Hi", 7), broken]), b"data: [DONE]\n\n"])
    asyncio.run(connection.run())
    assert connection.events[2:] == [broken, "data: [DONE]"]
    assert connection.service.asked == []
    assert count("gnuq_unscored_requests_total", route="chat", reason="incomplete") == before + 1


@pytest.mark.parametrize("listens", [True, False], ids=["the app listens", "only we listen"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_while_it_is_scored_frees_everything(listens, stream):
    async def go():
        service = StandInService()
        service.ready = asyncio.Event()
        if stream:
            connection = Connection([*map(event, EVENTS), b"data: [DONE]\n\n"], service, listens=listens)
        else:
            connection = Connection([], service)

            async def app(scope, receive, send):
                await receive()
                await JSONResponse(vllm_response())(scope, receive, send)

            connection.app = app
        running = asyncio.ensure_future(connection.run())
        await service.was_asked.wait()
        sent = len(connection.sent)
        connection.hung_up.set()
        await asyncio.wait_for(running, 5)
        return service, connection.sent[sent:], [task for task in asyncio.all_tasks() if not task.done()]

    before = count("gnuq_unscored_requests_total", route="chat", reason="incomplete")
    service, sent_after, tasks = asyncio.run(go())
    assert service.given_up == 1
    assert not any(b"uncertainty" in message.get("body", b"") for message in sent_after)
    assert len(tasks) == 1  # this one
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


def of_choice(index, data):
    return data | {"choices": [data["choices"][0] | {"index": index}]}


def test_a_choice_is_scored_as_soon_as_it_has_finished():
    """The first one's score is asked for while the second goes on; each gets its own."""
    service = StandInService()
    scored = {7: SCORED.replace(id="unc-7"), 8: SCORED.replace(id="unc-8")}
    asked_then = []

    async def score(answers, options, context):
        service.asked.append(answers)
        return [scored[answer.answer_ids[0]].to_dict() for answer in answers]

    service.score = score
    end = chunk("", 2, finish_reason="stop")
    messages = [of_choice(0, ROLE), of_choice(1, ROLE), of_choice(1, chunk("Ho", 8)), of_choice(1, end)]
    messages += [of_choice(0, chunk("Hi", 7)), of_choice(0, end), USAGE]
    connection = Connection([*map(event, messages), b"data: [DONE]\n\n"], service, REQUEST | {"n": 2})

    async def go():
        app = connection.app

        async def slowly(scope, receive, send):
            async def send_on(message):
                await send(message)
                await asyncio.sleep(0)
                asked_then.append(len(service.asked))

            await app(scope, receive, send_on)

        connection.app = slowly
        await connection.run()

    asyncio.run(go())
    assert asked_then == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    closing = connection.events[-3]
    assert [choice["uncertainty"]["id"] for choice in closing["choices"]] == ["unc-7", "unc-8"]
