"""The sidecar in front of a server that answers as vLLM does: keys, limits, metrics, adapters."""

import asyncio

import httpx
import pytest
from local_server import serving
from prometheus_client import REGISTRY
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from gnuq_serve.service.proxy.app import proxy_app
from gnuq_serve.service.proxy.proxied_model import ModelFacts, differences
from gnuq_serve.service.proxy.upstream import Model, Upstream, read_waiting
from gnuq_serve.service.served import ServedModel, Server
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings.model import load_settings

KEY = {"authorization": "Bearer right"}
WRONG = {"authorization": "Bearer wrong"}
CHAT = "/v1/chat/completions"
METRICS = """# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0"} 3.0
vllm:num_requests_waiting{engine="1"} 2.0
"""
SERVED = ServedModel(model="some/model", dtype="float32", end_of_turn_ids=(2,))
REQUEST = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}


class StandInService(UncertaintyService):
    """The service without a scorer process: it remembers what it is asked."""

    def __init__(self, **settings):
        super().__init__(load_settings().model_copy(update=settings))
        self.asked = []

    def start(self, served, server):
        self.served, self.server = served, server

    async def score(self, answers, options, context=None):
        self.asked += answers
        return [{"status": "scored", "id": "unc-1"} for _ in answers]

    async def result(self, result_id):
        return {"status": "scored", "id": result_id}


class Behind:
    """vLLM's part: its key guards what begins with /v1."""

    def __init__(self):
        self.asked, self.bodies = [], []
        self.models = [
            {"id": "base", "root": "some/model", "max_model_len": 2048},
            {"id": "lora-a", "root": "/adapters/a", "parent": "base"},
        ]
        paths = ("/v1/models", CHAT, "/v1/responses", "/tokenize", "/metrics", "/health")
        routes = [Route(path, self.answer, methods=["GET", "POST"]) for path in paths]
        self.app = Starlette(routes=routes)

    async def answer(self, request):
        path = request.url.path
        self.asked.append((request.method, path, request.headers.get("authorization")))
        self.bodies.append(await request.body())
        if path.startswith("/v1") and request.headers.get("authorization") != KEY["authorization"]:
            return JSONResponse({"error": "Unauthorized"}, 401)
        if path == "/metrics":
            return PlainTextResponse(METRICS)
        if path == "/tokenize":
            return JSONResponse({"tokens": [7]})
        if path == "/v1/models":
            return JSONResponse({"object": "list", "data": self.models})
        choice = {"index": 0, "message": {"content": "x"}, "logprobs": None, "token_ids": [7, 2]}
        return JSONResponse({"choices": [choice], "prompt_token_ids": [1]})


@pytest.fixture(scope="module")
def behind():
    return Behind()


@pytest.fixture(scope="module")
def service():
    return StandInService(max_body_bytes=1000)


@pytest.fixture(scope="module")
def url(behind, service):
    with serving(behind.app) as upstream_url:
        upstream = Upstream(upstream_url, "right")
        server = Server(adapters=upstream.adapters, parses=lambda: None)
        app = proxy_app(service, upstream, SERVED, server)
        with serving(app, lifespan="on") as front:
            yield front


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, trust_env=False, timeout=5) as client:
        yield client


def test_an_answer_is_scored_on_its_way(client, service):
    choice = client.post(CHAT, json=REQUEST, headers=KEY).json()["choices"][0]
    assert choice["uncertainty"]["status"] == "scored"
    assert (service.asked[-1].prompt_ids, service.asked[-1].answer_ids) == ([1], [7, 2])
    assert choice["token_ids"] is None


def test_an_adapters_answer_is_not_scored_by_the_base_model(client, behind):
    for name in ("lora-a", "loaded-a-moment-ago"):
        choice = client.post(CHAT, json=REQUEST | {"model": name}, headers=KEY).json()["choices"][0]
        assert choice["uncertainty"]["status"] == "skipped"
        assert "adapter not loaded" in choice["uncertainty"]["reason"]


@pytest.mark.parametrize("headers", [{}, WRONG, {"authorization": "right"}], ids=str)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/uncertainty/health"),
        ("GET", "/v1/uncertainty/unc-1"),
        ("POST", "/v1/uncertainty"),
        ("POST", CHAT),
        ("POST", "/v1/responses"),
    ],
)
def test_the_upstreams_key_guards_every_v1_route(client, service, method, path, headers):
    before = len(service.asked)
    body = {"prompt_token_ids": [1], "answer_token_ids": [2]} if path == "/v1/uncertainty" else REQUEST
    response = client.request(method, path, json=body, headers=headers)
    assert (response.status_code, response.json()) == (401, {"error": "Unauthorized"})
    assert len(service.asked) == before
    assert client.request(method, path, json=body, headers=KEY).status_code in (200, 503)


def test_our_own_key_is_not_lent_to_clients(client, behind):
    """The proxy has one for itself."""
    client.get("/v1/models")
    assert behind.asked[-1] == ("GET", "/v1/models", None)


def test_mistakes_are_explained_only_to_those_with_a_key(client):
    wrong = REQUEST | {"uncertainty": {"mood": 1}}
    assert client.post(CHAT, json=wrong).status_code == 401
    assert client.post(CHAT, json=wrong, headers=KEY).status_code == 400


def test_a_key_is_believed_for_a_while(client, behind):
    client.get("/v1/uncertainty/unc-1", headers=KEY)
    before = len(behind.asked)
    for _ in range(3):
        client.get("/v1/uncertainty/unc-1", headers=KEY)
        client.get("/v1/uncertainty/unc-1", headers=WRONG)
    assert behind.asked[before:] == [("GET", "/v1/models", WRONG["authorization"])] * 3


def test_given_answers_are_tokenized_upstream(client, service, behind):
    response = client.post("/v1/uncertainty", json={"prompt": "a", "answer": "b"}, headers=KEY)
    assert response.status_code == 200
    assert ("POST", "/tokenize", KEY["authorization"]) in behind.asked
    assert (service.asked[-1].prompt_ids, service.asked[-1].answer_ids) == ([7], [7, 2])


def test_metrics_are_the_upstreams_and_ours(client):
    lines = client.get("/metrics").text.splitlines()
    assert lines[:3] == METRICS.splitlines()
    assert any(line.startswith("gnuq_") for line in lines)
    # The upstream has its own of these.
    assert any(family.name.startswith("python_") for family in REGISTRY.collect())
    assert not any(line.startswith(("python_", "process_")) for line in lines)


@pytest.mark.parametrize("path", ["/health/", "/metrics/"])
def test_the_upstreams_redirects_lead_through_the_proxy(client, url, path):
    response = client.get(path)
    assert response.status_code == 307
    assert response.headers["location"] == path.rstrip("/")
    assert client.get(path, follow_redirects=True).status_code == 200


def test_long_requests_are_refused_only_where_they_are_read(client, behind):
    long = {"messages": "x" * 1000}
    for path in (CHAT, "/v1/uncertainty"):
        for content in (httpx.Request("POST", "http://x", json=long).content, iter([b"x" * 600, b"y" * 600])):
            response = client.post(path, content=content, headers=KEY)
            assert response.status_code == 413
            assert "max_body_bytes=1000" in response.json()["error"]["message"]
    assert client.post("/v1/responses", json=long, headers=KEY).status_code == 200
    assert len(behind.bodies[-1]) > 1000


def test_waiting_requests_are_read_off_the_metrics():
    assert read_waiting(METRICS) == 5
    assert read_waiting("") is None
    assert read_waiting('vllm:num_requests_waiting_by_reason{reason="capacity"} 4.0\n') is None


def test_waiting_requests_are_asked_for(url):
    async def ask():
        async with asyncio.timeout(5):
            upstream = Upstream(url)
            watching = asyncio.create_task(upstream.watch_load(0.01))
            await asyncio.sleep(0.3)
            watching.cancel()
            await upstream.close()
            return upstream.waiting()

    assert asyncio.run(ask()) == 5


def differing(*models, context=8192):
    return differences(SERVED, ModelFacts((2,), context), [Model(**model) for model in models])


def test_a_server_that_serves_something_else_is_noticed():
    base = {"id": "m", "root": "/models/Model", "max_model_len": 8192}
    adapter = {"id": "a", "root": "/elsewhere", "parent": "m", "max_model_len": 99_999}
    assert differing(base, adapter) == []
    (warning,) = differing(base | {"root": "another/one"})
    assert "another/one" in warning
    assert "some/model" in warning
    (warning,) = differing(base | {"max_model_len": 8193})
    assert "--hf-overrides" in warning
    assert differing(base | {"max_model_len": 8193}, context=None) == []
    assert differing({"id": "m"}) == []


def test_a_gating_proxy_refuses_what_it_can_not_score(behind):
    async def unscored(answers, options, context=None):
        return [{"status": "failed", "id": "unc-1"} for _ in answers]

    service = StandInService(on_failure="closed", abstain_text="Ask a person.")
    with serving(behind.app) as upstream_url:
        upstream = Upstream(upstream_url, "right")
        app = proxy_app(service, upstream, SERVED, Server(adapters=upstream.adapters, parses=lambda: None))
        with serving(app, lifespan="on") as front, httpx.Client(base_url=front, trust_env=False) as client:
            before = len(behind.asked)
            assert client.post("/v1/responses", json={"input": "?"}, headers=KEY).status_code == 403
            assert client.post("/v1//responses", json={"input": "?"}, headers=KEY).status_code == 403
            assert client.get("/v1/x/%2e%2e/responses", headers=KEY).status_code == 403
            assert "/v1/responses" not in [path for _, path, _ in behind.asked[before:]]
            assert client.get("/v1/models", headers=KEY).status_code == 200
            certain = client.post(CHAT, json=REQUEST, headers=KEY).json()["choices"][0]
            assert certain["message"]["content"] == "x"
            service.score = unscored
            withheld = client.post(CHAT, json=REQUEST, headers=KEY).json()["choices"][0]
            assert withheld["message"]["content"] == "Ask a person."
            assert withheld["uncertainty"]["withheld"] == "unscored"
