"""`gnuq-serve proxy` in front of a plain vLLM server: the same answers and scores as with the plugin.

Asked of the plain server, of the proxy with scoring off, and of the proxy; streamed and not.
"""

import re
import time

import httpx
import openai
import psutil
import pytest
from live_server import (
    BODIES,
    CHAT,
    COMPLETION,
    HEADERS,
    KEY,
    NAME,
    ask,
    ask_for,
    ask_streamed,
    by_choice,
    proxy_command,
    scorer_of,
    split_stream,
    stable,
    wait_for_scorer,
    without_score,
)
from test_same_as_vllm import CHAT as CHAT_ROUTE
from test_same_as_vllm import OFF, STREAMED, TEXT, TRIES, TWICE, WHOLE, assert_no_false_warning

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

# The proxy does not know whether the server has parsers: with one, it could not undo this.
UNKNOWN = {"include_reasoning": False}


def status_here(more, status):
    return "skipped" if UNKNOWN.items() <= more.items() else status


def a_third_of(cases):
    """All that differ in more than sampling would take a minute; what is left covers each kind."""
    return [case for number, case in enumerate(cases) if number % 3 == 0 or UNKNOWN.items() <= case[1].items()]


@pytest.mark.parametrize(("route", "more", "status"), a_third_of(WHOLE), ids=str)
def test_whole(proxy_server, plain_server, route, more, status):
    body = BODIES[route] | more
    status = status_here(more, status)
    for _ in range(TRIES):  # as in test_same_as_vllm
        plain = stable(ask(plain_server, route, body))
        off, on = ask(proxy_server, route, body | OFF), ask(proxy_server, route, body)
        scores = []
        if status is not None:
            on, scores = without_score(on, asked_logprobs="logprobs" in more)
        if stable(off) == stable(on) == plain:
            break
    assert stable(off) == plain
    assert stable(on) == plain
    if status is None:
        assert "error" in plain
        return
    assert {score["status"] for score in scores} == {status}
    assert_no_false_warning(scores)


@pytest.mark.parametrize(("route", "more", "status"), a_third_of(STREAMED), ids=str)
def test_streamed(proxy_server, plain_server, route, more, status):
    body = BODIES[route] | more
    status = status_here(more, status)
    for _ in range(TRIES):
        plain = by_choice(ask_streamed(plain_server, route, body))
        off = by_choice(ask_streamed(proxy_server, route, body | OFF))
        events, scores = ask_streamed(proxy_server, route, body), []
        if status is not None:
            events, scores = split_stream(events)
        if off == by_choice(events) == plain:
            break
    assert off == plain
    assert by_choice(events) == plain
    if status is not None:
        assert {score["status"] for score in scores} == {status}
        assert len(scores) == len([key for key in plain if key])
        assert_no_false_warning(scores)


@pytest.mark.parametrize(("route", "more"), [(CHAT_ROUTE, {}), (CHAT_ROUTE, TWICE), (TEXT, {})], ids=str)
def test_the_plugin_and_the_proxy_score_alike(server, proxy_server, route, more):
    body = BODIES[route] | more
    _, mine = without_score(ask(server, route, body))
    _, its = without_score(ask(proxy_server, route, body))
    for here, there in zip(mine, its, strict=True):
        assert here["fingerprint"] == there["fingerprint"]
        for name in ("tokens", "log_probability", "log_grad_norm_sq", "entropy"):
            assert here[name] == pytest.approx(there[name], abs=1e-4), name


@pytest.fixture
def client(proxy_server):
    with openai.OpenAI(base_url=f"{proxy_server.base_url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_the_openai_client_streams(client):
    options = {"include_usage": True}
    *chunks, last, usage = client.chat.completions.create(**CHAT, stream=True, stream_options=options)
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert last.choices[0].model_extra["uncertainty"]["status"] == "scored"
    assert usage.usage.total_tokens > 0
    long = CHAT | {"max_tokens": 40, "extra_body": {"ignore_eos": True}}
    times = [time.monotonic() for _ in client.chat.completions.create(**long, stream=True)]
    assert times[-2] - times[0] > 5 * (times[2] - times[1]), "the tokens came all at once"


def test_errors_come_back_as_the_server_made_them(client, proxy_server, plain_server):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**CHAT | {"temperature": -1})
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(**CHAT | {"model": "unknown"})
    for method, path, body in (
        ("POST", "/v1/chat/completions", CHAT | {"max_tokens": -1}),
        ("POST", "/v1/chat/completions", {"model": NAME, "messages": 7}),
        ("POST", "/v1/embeddings", {"model": NAME, "input": "x"}),
        ("GET", "/v1/nothing", None),
        ("GET", "/v1/chat/completions", None),
    ):
        direct, through = (
            httpx.request(method, running.base_url + path, json=body, headers=HEADERS)
            for running in (plain_server, proxy_server)
        )
        assert direct.status_code >= 400
        assert (through.status_code, through.content) == (direct.status_code, direct.content)
        assert header_names(through) == header_names(direct)


def header_names(response):
    return sorted(name.lower() for name in response.headers if name.lower() != "transfer-encoding")


def test_every_other_route_is_the_servers(proxy_server, plain_server):
    for path in ("/health", "/version", "/v1/models", "/ping", "/openapi.json"):
        direct, through = (
            httpx.get(running.base_url + path, headers=HEADERS) for running in (plain_server, proxy_server)
        )
        assert through.status_code == direct.status_code, path
        if path != "/v1/models":  # it holds the time
            assert through.content == direct.content, path
    body = {"model": NAME, "prompt": "The capital"}
    assert ask(proxy_server, "../tokenize", body) == ask(plain_server, "../tokenize", body)
    body = {"model": NAME, "input": "Hi", "max_output_tokens": 4, "temperature": 0}
    assert ask(proxy_server, "responses", body)["output"][0]["content"]


@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("POST", "chat/completions"),
        ("POST", "uncertainty"),
        ("GET", "uncertainty/health"),
        ("GET", "uncertainty/unc-1"),
        ("GET", "models"),
    ],
)
def test_the_servers_key_guards_every_route(proxy_server, plain_server, method, route):
    for headers in ({}, {"authorization": "Bearer wrong"}):
        response = httpx.request(method, f"{proxy_server.base_url}/v1/{route}", json=CHAT, headers=headers)
        plain = httpx.get(f"{plain_server.base_url}/v1/models", headers=headers)
        assert (response.status_code, response.content) == (401, plain.content)


def test_results_and_given_answers(proxy_server):
    pending = ask(proxy_server, CHAT_ROUTE, CHAT | {"uncertainty": {"wait": False}})["choices"][0]["uncertainty"]
    assert pending["status"] == "pending"
    later = ask_for(proxy_server, pending["id"])
    text = ask(proxy_server, CHAT_ROUTE, CHAT)["choices"][0]["message"]["content"]
    given = ask(proxy_server, "uncertainty", {"messages": CHAT["messages"], "answer": text})
    assert given["log_grad_norm_sq"] == pytest.approx(later["log_grad_norm_sq"], abs=1e-4)


def test_metrics_of_both(proxy_server):
    ask(proxy_server, TEXT, COMPLETION)
    text = httpx.get(f"{proxy_server.base_url}/metrics").text
    assert re.search(r"^vllm:num_requests_running\{.*\} 0\.0$", text, re.MULTILINE)
    assert re.search(r'^gnuq_answers_total\{.*route="completion".*\} [1-9]', text, re.MULTILINE)
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_the_engine(proxy_server, stream):
    def running():
        text = httpx.get(f"{proxy_server.base_url}/metrics").text
        return float(re.search(r"^vllm:num_requests_running\{.*\} (\S+)$", text, re.MULTILINE)[1])

    body = CHAT | {"max_tokens": 1500, "ignore_eos": True, "stream": stream}
    url = f"{proxy_server.base_url}/v1/chat/completions"
    if stream:
        with httpx.stream("POST", url, json=body, headers=HEADERS) as response:
            for _, _ in zip(range(5), response.iter_lines(), strict=False):
                pass
            assert running() == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, headers=HEADERS, timeout=1)
    deadline = time.monotonic() + 10
    while running() > 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "Traceback" not in proxy_server.log_path.read_text()


def test_a_killed_scorer_costs_no_answer(proxy_server):
    scorer_of(proxy_server).kill()
    choice = ask(proxy_server, CHAT_ROUTE, CHAT)["choices"][0]
    assert "Paris" in choice["message"]["content"]
    assert choice["uncertainty"]["status"] in ("failed", "scored")  # scored: it was there again
    wait_for_scorer(proxy_server)


def test_it_is_light_and_its_scorer_listens_nowhere(proxy_server):
    proxy = psutil.Process(proxy_server.pid)
    assert proxy.memory_info().rss < 300 * 2**20  # no torch in it
    assert scorer_of(proxy_server).net_connections("inet") == []
    assert len([c for c in proxy.net_connections("inet") if c.status == psutil.CONN_LISTEN]) == 1


def test_a_wrong_key_of_its_own_is_told_at_once(smollm2, plain_server, start):
    command = proxy_command(smollm2, plain_server, "wrong")
    with start(command) as running, pytest.raises(Exception, match="--upstream-api-key"):
        running.wait_until_ready(["/health"], timeout=60)
