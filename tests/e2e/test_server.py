"""Every answer accounted for, against the real server with the `openai` client."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from live_server import ENV, GNUQ_SERVE, KEY, NAME, OPTIONS, wait_for_scorer

from gnuq_serve.managed_server import ManagedServer, free_port

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

HEADERS = {"Authorization": f"Bearer {KEY}"}
CHAT = {
    "model": NAME,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "max_tokens": 16,
}
COMPLETION = {"model": NAME, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}


def post(server, body, route="chat/completions"):
    response = httpx.post(f"{server.base_url}/v1/{route}", json=body, headers=HEADERS, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def stable(response):
    """A response without what differs between two calls."""
    return {name: value for name, value in response.items() if name not in {"id", "created"}}


@pytest.mark.parametrize(("route", "body"), [("chat/completions", CHAT), ("completions", COMPLETION)])
def test_switched_off_is_untouched_and_scored_differs_only_by_the_score(server, route, body):
    off = post(server, {**body, "uncertainty": False}, route)
    on = post(server, body, route)
    assert "uncertainty" not in json.dumps(off)
    for choice in on["choices"]:
        mirrored = choice["logprobs"].pop("uncertainty")
        assert choice.pop("uncertainty") == mirrored
        assert not any(choice["logprobs"].values())
        choice["logprobs"] = None
    assert stable(on) == stable(off)


def test_token_ids_and_logprobs_that_the_client_asks_for_stay(server):
    asked = {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    off = post(server, {**CHAT, **asked, "uncertainty": False})
    on = post(server, {**CHAT, **asked})
    on["choices"][0].pop("uncertainty")
    on["choices"][0]["logprobs"].pop("uncertainty")
    assert on["choices"][0]["token_ids"]
    assert stable(on) == stable(off)


def test_several_choices_each_have_their_own(client):
    response = client.chat.completions.create(**{**CHAT, "temperature": 1.0}, n=3, seed=7)
    scores = [choice.model_extra["uncertainty"] for choice in response.choices]
    assert [score["status"] for score in scores] == ["scored"] * 3
    assert len({score["id"] for score in scores}) == 3
    assert all(not score["warnings"] for score in scores)


def test_prompt_lists_and_stop_strings(client):
    prompts = ["The capital of France is", "The capital of France is", "Two and two make"]
    response = client.completions.create(**{**COMPLETION, "prompt": prompts}, stop=["."])
    scores = [choice.model_extra["uncertainty"] for choice in response.choices]
    assert [score["status"] for score in scores] == ["scored"] * 3
    assert scores[0]["log_grad_norm_sq"] == pytest.approx(scores[1]["log_grad_norm_sq"], abs=1e-4)
    assert abs(scores[0]["log_grad_norm_sq"] - scores[2]["log_grad_norm_sq"]) > 1e-2


def test_grammar_gives_no_false_warning(server):
    choice = post(server, {**CHAT, "response_format": {"type": "json_object"}})["choices"][0]
    assert choice["uncertainty"]["status"] == "scored"
    assert choice["uncertainty"]["warnings"] == []


def test_what_cannot_be_scored_says_why(server):
    choice = post(server, {**COMPLETION, "echo": True}, "completions")["choices"][0]
    assert choice["text"].startswith(COMPLETION["prompt"])
    assert (choice["uncertainty"]["status"], choice["uncertainty"]["reason"]) == ("skipped", "echo is not scored")


def test_streams_pass_and_are_counted(client, server):
    stream = client.chat.completions.create(**CHAT, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert "Paris" in text
    metrics = httpx.get(f"{server.base_url}/metrics").text
    assert re.search(r'gnuq_unscored_requests_total\{reason="stream",route="chat"\} [1-9]', metrics)
    assert "Paris" not in metrics


def test_wrong_option_is_a_clear_error(server):
    body = {**CHAT, "uncertainty": {"mood": "exact"}}
    response = httpx.post(f"{server.base_url}/v1/chat/completions", json=body, headers=HEADERS)
    assert response.status_code == 400
    assert "uncertainty.mood is unknown" in response.json()["error"]["message"]


def test_errors_of_vllm_pass_unchanged(server):
    bad = {**CHAT, "max_tokens": -1}
    url = f"{server.base_url}/v1/chat/completions"
    on = httpx.post(url, json=bad, headers=HEADERS)
    off = httpx.post(url, json={**bad, "uncertainty": False}, headers=HEADERS)
    assert on.status_code == 400
    assert on.json() == off.json()


@pytest.mark.parametrize("route", ["chat/completions", "uncertainty/health"])
def test_the_api_key_guards_our_routes(server, route):
    method = "GET" if route.startswith("uncertainty") else "POST"
    assert httpx.request(method, f"{server.base_url}/v1/{route}", json=CHAT).status_code == 401


def test_no_text_in_the_log(server):
    post(server, CHAT)
    log = server.log_path.read_text()
    assert "capital of France" not in log


def test_example_prints_its_table(server):
    example = Path(__file__).parents[2] / "examples" / "chatbot_routing.py"
    command = [sys.executable, str(example), "--base-url", f"{server.base_url}/v1", "--api-key", KEY]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "log‖∇ℓ‖²" in run.stdout  # noqa: RUF001
    assert "uncalibrated" in run.stdout


def test_a_killed_scorer_costs_no_answer_and_comes_back(server):
    scorers = [
        p for p in psutil.process_iter(["name", "cmdline"]) if "gnuq-serve: scorer" in " ".join(p.info["cmdline"])
    ]
    assert len(scorers) == 1
    os.kill(scorers[0].pid, signal.SIGKILL)
    choice = post(server, CHAT)["choices"][0]
    assert "Paris" in choice["message"]["content"]
    assert choice["uncertainty"]["status"] == "failed"
    assert "died" in choice["uncertainty"]["reason"]
    wait_for_scorer(server)
    assert post(server, CHAT)["choices"][0]["uncertainty"]["status"] == "scored"


def test_by_hand_with_a_scorer_that_cannot_start(smollm2, tmp_path):
    """The plugin alone, configured by file: the answers arrive, each with the reason why it has no score."""
    config = tmp_path / "gnuq.yaml"
    config.write_text(f"scorer_model: {tmp_path / 'nowhere'}\n")
    port = free_port()
    # What the console script `vllm` runs; it does not start itself with the CPU build.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2)]
    command += [*OPTIONS, "--port", str(port)]
    env = {**ENV, "VLLM_PLUGINS": "gnuq", "GNUQ_CONFIG": str(config)}
    with ManagedServer(command, env, port, tmp_path / "server.log") as running:
        running.wait_until_ready(["/health"])
        state = wait_for_scorer(running, "failed")
        assert "nowhere" in state["reason"]
        choice = post(running, CHAT)["choices"][0]
        assert "Paris" in choice["message"]["content"]
        assert choice["uncertainty"]["status"] == "failed"
        assert "nowhere" in choice["uncertainty"]["reason"]


def test_serve_refuses_a_wrong_settings_file(tmp_path):
    config = tmp_path / "gnuq.yaml"
    config.write_text("scorer_modell: x\n")
    command = [GNUQ_SERVE, "serve", "anything", "--gnuq-config", str(config)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "did you mean 'scorer_model'?" in run.stderr
