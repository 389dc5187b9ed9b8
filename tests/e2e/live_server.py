"""How the tests start real servers, ask them, and compare their answers."""

import json
import os
import sys
import time
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from gnuq_serve.demo_model import NAME, OFFLINE
from gnuq_serve.managed_server import CPU_ENVIRONMENT, HOST

KEY = "test-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
ENV = {**CPU_ENVIRONMENT, **OFFLINE}
OPTIONS = ["--served-model-name", NAME, "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
OPTIONS += ["--max-num-seqs", "8", "--api-key", KEY, "--host", HOST]
OPTIONS += ["--num-gpu-blocks-override", "64"]  # 8,192 tokens and .4 GiB: several servers run at a time
OPTIONS += ["--tool-call-parser", "hermes", "--enable-auto-tool-choice"]
GNUQ_SERVE = str(Path(sys.executable).with_name("gnuq-serve"))
VLLM = [sys.executable, "-m", "gnuq_serve.vllm.server_main"]


def proxy_command(model, upstream, key=KEY):
    """`gnuq-serve proxy` in front of a running server."""
    command = [GNUQ_SERVE, "proxy", "--upstream", upstream.base_url, "--upstream-api-key", key]
    return [*command, "--model", str(model), "--dtype", "float32", "--host", HOST]


CHAT = {
    "model": NAME,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "max_tokens": 16,
}
COMPLETION = {"model": NAME, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}
BODIES = {"chat/completions": CHAT, "completions": COMPLETION}

os.environ["NO_PROXY"] = os.environ["no_proxy"] = HOST


def wait_for_scorer(running, status="ready"):
    """Our health route stands behind the API key, so it is asked with one."""
    url = f"{running.base_url}/v1/uncertainty/health"
    for _ in range(240):
        state = httpx.get(url, headers=HEADERS).json()
        if state["status"] == status:
            return state
        time.sleep(0.25)
    raise AssertionError(f"the scorer is not {status}: {state}\n{running.log_tail()}")


def ask(running, route, body):
    """The response as JSON; an error too."""
    return httpx.post(f"{running.base_url}/v1/{route}", json=body, headers=HEADERS, timeout=120).json()


def ask_streamed(running, route, body):
    """The events of a streamed response, each as JSON but for the last; an error as the only one."""
    url, events = f"{running.base_url}/v1/{route}", []
    with httpx.stream("POST", url, json=body | {"stream": True}, headers=HEADERS, timeout=120) as response:
        if response.headers["content-type"].startswith("application/json"):
            response.read()
            return [response.json()]
        for line in response.iter_lines():
            if line and not line.startswith(":"):  # a comment: a held stream is alive
                assert line.startswith("data: ")
                data = line.removeprefix("data: ")
                events.append(json.loads(data) if data != "[DONE]" else data)
    return events


def chat_openai(running, **settings):
    """LangChain's stock client of a server."""
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(base_url=f"{running.base_url}/v1", api_key=KEY, model=NAME, temperature=0, **settings)


def ask_for(running, result_id):
    """A pending result when it has come."""
    for _ in range(600):
        response = httpx.get(f"{running.base_url}/v1/uncertainty/{result_id}", headers=HEADERS)
        if response.status_code != 202:
            assert response.status_code == 200
            return response.json()
        assert response.json()["status"] == "pending"
        time.sleep(0.1)
    raise AssertionError("the result did not come")


def scorer_of(running):
    """The scorer process of a server."""
    (scorer,) = (
        process
        for process in psutil.Process(running.pid).children(recursive=True)
        if "gnuq-serve: scorer" in " ".join(process.cmdline())
    )
    return scorer


def families(running):
    """What the server's /metrics shows, by name."""
    text = httpx.get(f"{running.base_url}/metrics").text
    return {family.name: family for family in text_string_to_metric_families(text)}


def sample(running, name, **labels):
    """The sum over all samples of a name that have these labels."""
    return sum(
        one.value
        for family in families(running).values()
        for one in family.samples
        if one.name == name and labels.items() <= one.labels.items()
    )


def stable(response):
    """A response, or an event, without what differs between two calls: ids and times."""
    if not isinstance(response, dict):
        return response
    response = {name: value for name, value in response.items() if name not in {"id", "created"}}
    for choice in response.get("choices", []):
        for call in (choice.get("message") or choice.get("delta") or {}).get("tool_calls", []):
            call.pop("id", None)
    return response


def without_score(response, *, asked_logprobs=False):
    """A scored response as vLLM would have sent it, and the uncertainties that it carried."""
    scores = []
    for choice in response["choices"]:
        scores.append(choice.pop("uncertainty"))
        assert choice["logprobs"].pop("uncertainty") == scores[-1]
        if not asked_logprobs or not any(choice["logprobs"].values()):
            assert not any(choice["logprobs"].values())
            choice["logprobs"] = None
    return response, scores


def split_stream(events):
    """The events of a scored stream without the one that carries the scores, and the uncertainties.

    That one comes after the last token and before the usage and the end.
    """
    carriers = [
        i
        for i, event in enumerate(events)
        if isinstance(event, dict) and any("uncertainty" in choice for choice in event.get("choices", []))
    ]
    assert len(carriers) == 1
    (position,) = carriers
    scores = []
    for choice in events[position]["choices"]:
        assert choice["logprobs"]["uncertainty"] == choice["uncertainty"]
        scores.append(choice["uncertainty"])
    assert all(not event["choices"] for event in events[position + 1 : -1])
    assert events[-1] == "[DONE]"
    return events[:position] + events[position + 1 :], scores


def by_choice(events):
    """The events of a stream, those of each choice in their order: how choices take turns differs."""
    grouped = {}
    for event in map(stable, events):
        choices = event["choices"] if isinstance(event, dict) and "choices" in event else []
        grouped.setdefault(tuple(choice["index"] for choice in choices), []).append(event)
    return grouped
