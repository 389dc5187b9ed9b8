"""Whole responses through the middleware: what is asked of vLLM, what the client gets, what passes untouched."""

import asyncio
import hashlib
import json

import httpx
import pytest
from given_scores import CHAT, REQUEST, SCORED, StandInService, count, vllm_response
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from gnuq_serve.service.middleware import UncertaintyMiddleware


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
