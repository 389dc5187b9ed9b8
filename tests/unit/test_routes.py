import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from gnuq_serve.service.requests.request_plan import RequestOptions
from gnuq_serve.service.result_store import ResultStoreError
from gnuq_serve.service.routes import routes
from gnuq_serve.service.served import ServedModel, Server
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings.model import load_settings
from gnuq_serve.uncertainty import Uncertainty


class StandInService(UncertaintyService):
    """The service without a scorer process; ``results`` is what it knows."""

    def __init__(self):
        super().__init__(load_settings())
        self.server = Server(adapters=lambda: ["lora-a"])
        self.served = ServedModel(model="m", dtype="float32", end_of_turn_ids=(2,))
        self.results, self.asked = {}, []

    async def result(self, result_id):
        if isinstance(self.results, Exception):
            raise self.results
        return self.results.get(result_id)

    async def score(self, answers, options, context):
        self.asked += answers
        status = "scored" if options == RequestOptions() else "pending"
        return [Uncertainty(status=status, id="unc-9").to_dict() for _ in answers]


async def tokenize(request):
    body = await request.json()
    if body.get("model") == "unknown":
        return JSONResponse({"error": {"message": "The model `unknown` does not exist."}}, status_code=404)
    if "prompt" not in body:
        return JSONResponse({"tokens": [5, 6] if body.get("add_generation_prompt", True) else [5, 6, 7, 2]})
    return JSONResponse({"tokens": [*map(ord, body["prompt"])]})


@pytest.fixture
def service():
    return StandInService()


@pytest.fixture
def call(service):
    app = Starlette(routes=[*routes(service), Route("/tokenize", tokenize, methods=["POST"])])

    def call(method, path, **request):
        async def go():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://s") as client:
                return await client.request(method, path, **request)

        return asyncio.run(go())

    return call


def test_results_by_id(service, call):
    for status in ("scored", "pending", "failed"):
        service.results[f"unc-{status}"] = {"status": status, "id": f"unc-{status}"}
    codes = {status: call("GET", f"/v1/uncertainty/unc-{status}").status_code for status in ("scored", "pending")}
    assert codes == {"scored": 200, "pending": 202}
    assert call("GET", "/v1/uncertainty/unc-scored").json() == {"status": "scored", "id": "unc-scored"}
    unknown = call("GET", "/v1/uncertainty/unc-x")
    assert unknown.status_code == 404
    assert "unc-x" in unknown.json()["error"]["message"]


def test_results_that_cannot_be_read(service, call):
    service.results = ResultStoreError("results_path=/secret can't be used")
    response = call("GET", "/v1/uncertainty/unc-1")
    assert response.status_code == 503
    assert "secret" not in response.text


def test_health_is_no_id(call):
    assert call("GET", "/v1/uncertainty/health").json()["status"] == "starting"


def test_a_given_answer_is_scored(service, call):
    response = call("POST", "/v1/uncertainty", json={"prompt": "ab", "answer": "c"})
    assert (response.status_code, response.json()["status"]) == (200, "scored")
    assert (service.asked[0].prompt_ids, service.asked[0].answer_ids) == ([97, 98], [99, 2])
    call("POST", "/v1/uncertainty", json={"messages": [{"role": "user", "content": "x"}], "answer": "c"})
    assert (service.asked[1].prompt_ids, service.asked[1].answer_ids) == ([5, 6], [99, 2])


def test_a_given_answer_later(call):
    body = {"prompt_token_ids": [1], "answer_token_ids": [2], "uncertainty": {"wait": False}}
    response = call("POST", "/v1/uncertainty", json=body)
    assert (response.status_code, response.json()["status"]) == (202, "pending")


def test_a_given_answer_of_an_adapter(service, call):
    response = call("POST", "/v1/uncertainty", json={"model": "lora-a", "prompt": "ab", "answer": "c"})
    assert response.json()["status"] == "skipped"
    assert "adapter not loaded" in response.json()["reason"]
    assert service.asked == []


@pytest.mark.parametrize(
    ("request_body", "message"),
    [
        ({"content": b"{broken"}, "no JSON"),
        ({"content": b"\xff"}, "no JSON"),
        ({"json": {"prompt": "a"}}, "answer must be a text"),
        ({"json": {"model": "unknown", "prompt": "a", "answer": "b"}}, "`unknown` does not exist"),
    ],
)
def test_mistakes(service, call, request_body, message):
    response = call("POST", "/v1/uncertainty", **request_body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert service.asked == []
