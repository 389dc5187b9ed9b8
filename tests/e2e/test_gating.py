"""A real server that gates: what is uncertain, or has no score, never reaches the client."""

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise

import httpx
import openai
import psutil
import pytest
import yaml
from langchain_core.messages import HumanMessage
from live_server import (
    BODIES,
    CHAT,
    ENV,
    HEADERS,
    KEY,
    OPTIONS,
    VLLM,
    ask,
    ask_streamed,
    chat_openai,
    scorer_of,
    wait_for_scorer,
)
from made_calibration import saved

from gnuq_serve.calibration.artefact import LogisticScore, Seen
from gnuq_serve.service.requests.request_plan import ROUTES
from gnuq_serve.service.requests.unscored_routes import SILENT

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

TEXT = "Please ask a person."
STRICT = {"uncertainty": {"calibration": "strict"}}


def sure(value):
    """A model that gives every answer the same ``p_correct``."""
    return LogisticScore(("mean_log_probability",), (0.0,), (1.0,), (0.0,), value)


@pytest.fixture(scope="module")
def gated_server(smollm2, start, tmp_path_factory):
    """vLLM started by hand. Whether an answer is uncertain is up to the calibration that a request names."""
    folder = tmp_path_factory.mktemp("gated")
    made = {
        "lenient": {"model": sure(3.0), "seen": Seen(tool_calls=True)},
        "strict": {"model": sure(-3.0), "seen": Seen(tool_calls=True)},
        "greedy": {"model": sure(3.0), "fingerprint": {"sampling": "temperature=0 top_p=1 max_tokens=16"}},
    }
    config = folder / "gnuq.yaml"
    settings = {
        "calibrations": {name: saved(folder, name, **fields) for name, fields in made.items()},
        "default_calibration": "lenient",
        "policy": {"escalate": 0.3, "otherwise": "human"},
        "on_uncertain": "abstain",
        "on_failure": "closed",
        "abstain_text": TEXT,
        "deadline_seconds": 15,
    }
    config.write_text(yaml.safe_dump(settings))
    environment = ENV | {"VLLM_PLUGINS": "gnuq", "GNUQ_CONFIG": str(config)}
    with start([*VLLM, str(smollm2), *OPTIONS], environment) as running:
        running.wait_until_ready(["/health"])
        wait_for_scorer(running)
        yield running


@pytest.fixture
def gated_client(gated_server):
    with openai.OpenAI(base_url=f"{gated_server.base_url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def answers(gated_server):
    """The greedy answer of each route, as a certain one shows it: text and token ids."""
    found = {}
    for route, body in BODIES.items():
        response = ask(gated_server, route, body | {"return_token_ids": True})
        (choice,) = response["choices"]
        assert choice["uncertainty"]["decision"] == "answer"
        assert choice["uncertainty"]["p_correct"] == pytest.approx(0.9526, abs=1e-4)
        assert "withheld" not in choice["uncertainty"]
        found[route] = (choice.get("text") or choice["message"]["content"], choice["token_ids"])
    return found


def raw(running, route, body):
    return httpx.post(f"{running.base_url}/v1/{route}", json=body, headers=HEADERS, timeout=120)


def tells_of(text, answer):
    """Whether a response holds two words of the answer in a row, or two of its token ids."""
    words, ids = answer[0].split(), answer[1]
    pairs = [*pairwise(words)]
    return any(" ".join(pair) in text for pair in pairs) or any(
        f"{first},{second}" in text.replace(" ", "") for first, second in pairwise(ids)
    )


@pytest.mark.parametrize(
    "more", [{}, {"n": 2, "temperature": 0.7}, {"return_token_ids": True, "prompt_logprobs": 1}], ids=str
)
@pytest.mark.parametrize("route", BODIES)
def test_an_uncertain_answer_is_replaced(gated_server, answers, route, more):
    more = more | ({"logprobs": True, "top_logprobs": 2} if route == "chat/completions" else {"logprobs": 2})
    response = raw(gated_server, route, BODIES[route] | more | STRICT)
    assert not tells_of(response.text, answers[route])
    for choice in response.json()["choices"]:
        assert (choice.get("text") or choice["message"]["content"]) == TEXT
        assert choice["finish_reason"] == "content_filter"
        uncertainty = choice["uncertainty"]
        assert (uncertainty["status"], uncertainty["decision"], uncertainty["withheld"]) == (
            "scored",
            "human",
            "uncertain",
        )
        assert choice["logprobs"]["uncertainty"] == uncertainty
    assert response.json()["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("route", BODIES)
def test_a_stream_is_held_and_replaced(gated_server, answers, route):
    body = BODIES[route] | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    certain = ask_streamed(gated_server, route, body)
    events = ask_streamed(gated_server, route, body | STRICT | {"return_token_ids": True})
    assert not tells_of(json.dumps(events), answers[route])
    opening, end, closing, usage, done = events
    shown = "".join(
        c["text"] if "text" in c else c["delta"].get("content", "") for c in opening["choices"] + end["choices"]
    )
    assert shown == TEXT
    assert end["choices"][0]["finish_reason"] == "content_filter"
    assert closing["choices"][0]["uncertainty"]["withheld"] == "uncertain"
    assert usage["usage"] == certain[-2]["usage"]
    assert done == "[DONE]"
    text = "".join(
        choice.get("text") or choice.get("delta", {}).get("content") or ""
        for event in certain[:-1]
        for choice in event["choices"]
    )
    assert text == answers[route][0]


def test_openai_and_langchain_clients_read_a_replaced_answer(gated_server, gated_client):
    create = gated_client.chat.completions.create
    choice = create(**CHAT, extra_body=STRICT).choices[0]
    assert (choice.message.content, choice.finish_reason) == (TEXT, "content_filter")
    chunks = list(create(**CHAT, stream=True, extra_body=STRICT))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    model = chat_openai(gated_server, max_tokens=16, extra_body=STRICT)
    message = model.invoke([HumanMessage(CHAT["messages"][0]["content"])])
    assert message.content == TEXT
    assert message.response_metadata["finish_reason"] == "content_filter"
    assert "".join(chunk.content for chunk in model.stream("Hello?")) == TEXT


def test_a_tool_call_is_replaced_too(gated_server):
    """A grammar forces the call."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    call = r'<tool_call>\n\{"name": "f", "arguments": \{"a": "Xanadu"\}\}\n</tool_call>'
    body = CHAT | {"tools": [tool], "structured_outputs": {"regex": call}, "max_tokens": 64}
    (choice,) = ask(gated_server, "chat/completions", body)["choices"]
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"a": "Xanadu"}
    for response in (
        ask(gated_server, "chat/completions", body | STRICT),
        ask_streamed(gated_server, "chat/completions", body | STRICT),
    ):
        assert "Xanadu" not in json.dumps(response)
        assert TEXT in json.dumps(response)


def test_a_calibration_that_does_not_apply_judges_nothing(gated_server, answers):
    greedy = {"uncertainty": {"calibration": "greedy"}}
    (choice,) = ask(gated_server, "chat/completions", CHAT | greedy)["choices"]
    assert (choice["message"]["content"], choice["uncertainty"]["decision"]) == (
        answers["chat/completions"][0],
        "answer",
    )
    for changed, part in (({"max_tokens": 15}, "max_tokens=15"), ({"temperature": 0.01}, "temperature=0.01")):
        (choice,) = ask(gated_server, "chat/completions", CHAT | greedy | changed)["choices"]
        uncertainty = choice["uncertainty"]
        assert choice["message"]["content"] == TEXT
        assert (uncertainty["status"], uncertainty["p_correct"], uncertainty["withheld"]) == (
            "scored",
            None,
            "unscored",
        )
        assert part in uncertainty["warnings"][-1]
        assert "calibrated on temperature=0 top_p=1 max_tokens=16" in uncertainty["warnings"][-1]


def test_a_given_answer_gets_its_decision(gated_server):
    given = {"messages": CHAT["messages"], "answer": "Paris."}
    for name, decision in (("lenient", "answer"), ("strict", "human")):
        found = ask(gated_server, "uncertainty", given | {"uncertainty": {"calibration": name}})
        assert found["decision"] == decision
        assert found["calibration"].startswith(f"{name}@")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (False, "uncertainty: false is not allowed on this server"),
        ({"wait": False}, "uncertainty.wait: false is not allowed on this server"),
        ({"calibration": "law"}, "known: greedy, lenient, strict"),
    ],
)
def test_no_way_round_is_offered(gated_server, asked, said):
    for stream in (False, True):
        response = raw(gated_server, "chat/completions", CHAT | {"uncertainty": asked, "stream": stream})
        assert response.status_code == 400
        assert said in response.json()["error"]["message"]


def test_every_route_that_could_answer_is_refused(gated_server):
    """All that the server itself lists, with a body that vLLM would answer."""
    paths = httpx.get(f"{gated_server.base_url}/openapi.json").json()["paths"]
    bodies = CHAT | {"prompt": "Hi", "input": "Hi", "token_ids": [1], "sampling_params": {"max_tokens": 4}}
    refused = []
    for path, methods in paths.items():
        if path in ROUTES or path in SILENT or path.startswith("/v1/uncertainty"):
            continue
        for method in set(methods) - {"get", "head"}:
            url = gated_server.base_url + path.replace("{", "").replace("}", "")
            response = httpx.request(method, url, json=bodies, headers=HEADERS, timeout=60)
            assert response.status_code == 403, (method, path, response.text)
            refused.append(path)
    assert {"/v1/responses", "/v1/messages", "/v1/chat/completions/batch", "/invocations"} <= set(refused)
    stored = httpx.get(f"{gated_server.base_url}/v1/responses/resp_1", headers=HEADERS)
    assert stored.status_code == 403
    assert httpx.get(f"{gated_server.base_url}/v1/models", headers=HEADERS).status_code == 200
    metrics = httpx.get(f"{gated_server.base_url}/metrics").text
    assert 'gnuq_unscored_requests_total{reason="refused",route="/v1/responses"}' in metrics
    assert 'gnuq_withheld_answers_total{reason="uncertain",route="chat"}' in metrics


def test_while_the_scorer_is_dead_nothing_gets_out(gated_server, answers):
    cases = [(route, stream) for route in BODIES for stream in (False, True)]
    with ThreadPoolExecutor(len(cases)) as pool:
        asking = [
            pool.submit(raw, gated_server, route, BODIES[route] | {"stream": stream}) for route, stream in cases
        ]
        while not all(one.done() for one in asking):  # whatever is started again in between dies too
            with suppress(ValueError, psutil.Error):
                scorer_of(gated_server).kill()
            time.sleep(0.1)
    for (route, _), one in zip(cases, asking, strict=True):
        text = one.result().text
        assert TEXT in text
        assert '"withheld":"unscored"' in text
        assert not tells_of(text, answers[route])
    wait_for_scorer(gated_server)
    (choice,) = ask(gated_server, "completions", BODIES["completions"])["choices"]
    assert choice["text"] == answers["completions"][0]


def test_by_hand_settings_that_cannot_be_kept_stop_vllm(smollm2):
    environment = os.environ | ENV | {"VLLM_PLUGINS": "gnuq", "GNUQ_ON_UNCERTAIN": "abstain"}
    run = subprocess.run(
        [*VLLM, str(smollm2), *OPTIONS], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 1
    assert "gnuq: on_uncertain: abstain needs a decision on each answer" in run.stderr
