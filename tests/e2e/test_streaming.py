"""Streams with the `openai` client, and clients that hang up."""

import re
import threading
import time

import httpx
import pytest
from langchain_gnuq import UncertaintyCallbackHandler
from live_server import (
    BODIES,
    CHAT,
    COMPLETION,
    GNUQ_SERVE,
    HEADERS,
    OPTIONS,
    ask,
    ask_for,
    ask_streamed,
    chat_openai,
    scorer_of,
    split_stream,
    wait_for_scorer,
)

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def test_a_streamed_chat_ends_with_its_score(client):
    *chunks, last = client.chat.completions.create(**CHAT, stream=True)
    assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    score = last.choices[0].model_extra["uncertainty"]
    assert score["status"] == "scored"
    assert last.choices[0].logprobs.content is None
    assert last.choices[0].logprobs.model_extra["uncertainty"] == score


def test_a_streamed_completion_ends_with_its_scores(client):
    body = COMPLETION | {"prompt": ["The capital of France is", "Two and two make"], "n": 2, "temperature": 1.0}
    options = {"include_usage": True}
    *chunks, last, usage = client.completions.create(**body, stream=True, stream_options=options)
    assert all(len(chunk.choices) == 1 for chunk in chunks)
    assert [choice.index for choice in last.choices] == [0, 1, 2, 3]
    scores = [choice.model_extra["uncertainty"] for choice in last.choices]
    assert [score["status"] for score in scores] == ["scored"] * 4
    assert len({score["id"] for score in scores}) == 4
    assert usage.choices == []
    assert usage.usage.total_tokens > 0


@pytest.mark.parametrize("more", [{}, {"logprobs": True}], ids=str)
def test_the_clients_own_stream_helper(client, more):
    options = {name: CHAT[name] for name in ("model", "messages", "temperature", "max_tokens")}
    with client.chat.completions.stream(**options, **more) as stream:
        for _ in stream:
            pass
        completion = stream.get_final_completion()
    assert "Paris" in completion.choices[0].message.content
    assert completion.choices[0].finish_reason == "stop"


def test_langchain_streams(server):
    model = chat_openai(server, max_tokens=16, streaming=True, callbacks=[UncertaintyCallbackHandler()])
    answer = model.invoke(CHAT["messages"][0]["content"])
    assert "Paris" in answer.content
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["uncertainty"]["status"] == "scored"


@pytest.mark.parametrize("route", BODIES)
def test_without_waiting_the_stream_ends_at_once(server, route):
    _, (pending,) = split_stream(ask_streamed(server, route, BODIES[route] | {"uncertainty": {"wait": False}}))
    assert pending["status"] == "pending"
    _, (waited,) = split_stream(ask_streamed(server, route, BODIES[route]))
    later = ask_for(server, pending["id"])
    assert later["status"] == "scored"
    assert later["log_grad_norm_sq"] == pytest.approx(waited["log_grad_norm_sq"], abs=1e-4)


def gauge(server, name):
    text = httpx.get(f"{server.base_url}/metrics").text
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("route", BODIES)
def test_a_client_that_hangs_up_while_it_is_scored_frees_everything(server, route, stream):
    """With the scorer held up, so that the client certainly goes before the score comes."""
    before = gauge(server, "gnuq_unscored_requests_total")
    scorer = scorer_of(server)
    scorer.suspend()
    try:
        url, body = f"{server.base_url}/v1/{route}", BODIES[route] | {"stream": stream}

        def hang_up():
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=body, headers=HEADERS, timeout=httpx.Timeout(60, read=4))

        threads = [threading.Thread(target=hang_up) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: gauge(server, "gnuq_unscored_requests_total") == before + 4, 10)
        assert gauge(server, "vllm:num_requests_running") == 0
    finally:
        scorer.resume()
    start = time.monotonic()
    response = ask(server, route, BODIES[route])
    assert response["choices"][0]["uncertainty"]["status"] == "scored"
    assert time.monotonic() - start < 30


def test_a_client_that_hangs_up_among_the_tokens_stops_the_engine(server):
    before = gauge(server, "gnuq_unscored_requests_total")
    body = CHAT | {"max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.base_url}/v1/chat/completions", json=body, headers=HEADERS) as response:
        for _, _ in zip(range(5), response.iter_lines(), strict=False):
            pass
        assert gauge(server, "vllm:num_requests_running") == 1
    wait_until(lambda: gauge(server, "vllm:num_requests_running") == 0, 10)
    wait_until(lambda: gauge(server, "gnuq_unscored_requests_total") == before + 1, 10)


def test_a_client_that_hangs_up_before_its_whole_answer_stops_the_engine(server):
    logged = len(server.log_path.read_text())
    before = gauge(server, "gnuq_unscored_requests_total")
    body = CHAT | {"max_tokens": 1500, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.base_url}/v1/chat/completions", json=body, headers=HEADERS, timeout=1)
    wait_until(lambda: gauge(server, "vllm:num_requests_running") == 0, 10)
    wait_until(lambda: gauge(server, "gnuq_unscored_requests_total") == before + 1, 10)
    assert "Traceback" not in server.log_path.read_text()[logged:]


def test_a_scorer_that_is_too_slow_delays_the_end_no_longer_than_the_deadline(smollm2, start, tmp_path):
    config = tmp_path / "gnuq.yaml"
    config.write_text("deadline_seconds: 1\nmax_queue: 2\n")
    with start([GNUQ_SERVE, "serve", str(smollm2), *OPTIONS, "--gnuq-config", str(config)]) as running:
        running.wait_until_ready(["/health"])
        wait_for_scorer(running)
        scorer = scorer_of(running)
        scorer.suspend()
        events, (late,) = split_stream(ask_streamed(running, "chat/completions", CHAT))
        assert late["status"] == "skipped"
        assert "has not answered within 1 s" in late["reason"]
        body = CHAT | {"n": 3, "temperature": 1.0, "ignore_eos": True}  # so that the three end together
        _, scores = split_stream(ask_streamed(running, "chat/completions", body))
        assert sorted(score["reason"][:21] for score in scores) == ["the scorer has not an"] * 2 + [
            "the scoring queue is "
        ]
        scorer.kill()
        _, (dead,) = split_stream(ask_streamed(running, "chat/completions", CHAT))
        assert dead["status"] == "failed"
        content = "".join(e["choices"][0]["delta"].get("content", "") for e in events if isinstance(e, dict))
        assert "Paris" in content


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.05)
