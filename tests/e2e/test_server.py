"""Every answer accounted for, against the real server with the `openai` client."""

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from live_server import CHAT, COMPLETION, ENV, GNUQ_SERVE, HEADERS, KEY, OPTIONS, scorer_of, wait_for_scorer

from gnuq_serve.managed_server import ManagedServer, free_port

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def post(server, body, route="chat/completions"):
    response = httpx.post(f"{server.base_url}/v1/{route}", json=body, headers=HEADERS, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


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
    (warning,) = choice["uncertainty"]["warnings"]
    assert warning.startswith("a grammar forced tokens")


def test_what_cannot_be_scored_says_why(server):
    body = {**COMPLETION, "prompt": [504, 3575, 282, 4649, 314], "echo": True}
    choice = post(server, body, "completions")["choices"][0]
    assert choice["text"].startswith(COMPLETION["prompt"])
    assert choice["uncertainty"]["status"] == "skipped"
    assert "echo of a prompt of token ids" in choice["uncertainty"]["reason"]


def test_answers_are_counted(server):
    post(server, CHAT)
    post(server, CHAT | {"uncertainty": False})
    metrics = httpx.get(f"{server.base_url}/metrics").text
    assert re.search(r'gnuq_answers_total\{reason="",route="chat",status="scored"\} [1-9]', metrics)
    assert re.search(r'gnuq_unscored_requests_total\{reason="off",route="chat"\} [1-9]', metrics)
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
    scorer_of(server).kill()
    choice = post(server, CHAT)["choices"][0]
    assert "Paris" in choice["message"]["content"]
    score = choice["uncertainty"]
    # It waits for the next scorer, unless too many have died of late.
    assert score["status"] == "scored" or "died" in score["reason"]
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
