"""A real server of two API server processes: one scorer for both, which yields to the engine."""

import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from live_server import (
    CHAT,
    ENV,
    GNUQ_SERVE,
    HEADERS,
    NAME,
    OPTIONS,
    ask,
    sample,
    scorer_of,
    wait_for_scorer,
)
from made_calibration import made_calibration, promise, saved

from gnuq_serve.service.operator.label_store import read_labels
from gnuq_serve.service.scorer.folder import ScorerFolder

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


OPERATOR_KEY = "an operator's key of the tests"


@pytest.fixture(scope="module")
def temp():
    """Short, since the path of a Unix socket holds 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="t") as path:
        yield path


@pytest.fixture(scope="module")
def adapter(smollm2, tmp_path_factory):
    """A LoRA adapter that changes what the model says, but not beyond words."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)  # one half of the adapter is drawn where it is made
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def two(smollm2, start, temp, adapter):
    """`gnuq-serve serve --api-server-count 2`, ready to score whichever process is asked; it has an adapter."""
    command = [GNUQ_SERVE, "serve", str(smollm2), *OPTIONS, "--api-server-count", "2"]
    command += ["--enable-lora", "--lora-modules", f"tuned={adapter}"]
    command += ["--gnuq-config", str(Path(temp) / "gnuq.yaml"), "--gnuq-log-text"]
    command += ["--gnuq-score-log", str(Path(temp) / "scores.jsonl")]
    (Path(temp) / "gnuq.yaml").write_text("yield_to_engine: true\n")
    with start(command, ENV | {"TMPDIR": temp, "GNUQ_OPERATOR_KEY": OPERATOR_KEY}) as running:
        running.wait_until_ready(["/health"])
        for _ in range(8):  # each on a connection of its own, so that both are asked
            wait_for_scorer(running)
        yield running


def test_any_process_knows_every_result_and_all_counts(two):
    for _ in range(8):
        body = CHAT | {"max_tokens": 2, "uncertainty": {"wait": False}}
        pending = ask(two, "chat/completions", body)["choices"][0]["uncertainty"]
        assert pending["status"] == "pending"
        codes = set()
        while 200 not in codes:
            for _ in range(8):
                url = f"{two.base_url}/v1/uncertainty/{pending['id']}"
                codes.add(httpx.get(url, headers=HEADERS).status_code)
            time.sleep(0.1)
        assert codes <= {200, 202}
    for _ in range(4):  # whichever answers, it shows what both have counted
        assert sample(two, "gnuq_answers_total", route="chat", status="scored") == 8
        assert sample(two, "gnuq_log_grad_norm_sq_count") == 8
        assert sample(two, "gnuq_scorer_state", status="ready") == 2
        assert sample(two, "gnuq_scorer_state") == 2
        assert sample(two, "gnuq_queue_limit") == 256


def test_one_scorer_serves_both_and_yields_to_the_engine(two):
    """More requests than the engine takes at a time: while some wait, no batch is begun."""
    scorer = scorer_of(two)  # the only one of the whole server
    yielded = False
    with ThreadPoolExecutor(20) as pool:
        body = CHAT | {"max_tokens": 24, "ignore_eos": True}
        responses = [pool.submit(ask, two, "chat/completions", body) for _ in range(20)]
        while not all(response.done() for response in responses):
            state = httpx.get(f"{two.base_url}/v1/uncertainty/health", headers=HEADERS).json()
            yielded |= state["yielding"]
            time.sleep(0.05)
    scores = [response.result()["choices"][0]["uncertainty"] for response in responses]
    assert [score["status"] for score in scores] == ["scored"] * 20
    assert yielded
    assert scorer_of(two) == scorer


def test_an_adapters_answer_is_scored_with_the_adapter(two):
    """The engine's own log-probability of it says so: with other weights there would be a warning."""
    plain, tuned = (ask(two, "chat/completions", CHAT | {"model": model}) for model in (NAME, "tuned"))
    scores = [response["choices"][0]["uncertainty"] for response in (plain, tuned)]
    assert [score["status"] for score in scores] == ["scored", "scored"]
    assert [score["warnings"] for score in scores] == [[], []]
    assert abs(scores[0]["log_probability"] - scores[1]["log_probability"]) > 0.1
    assert scores[0]["fingerprint"] != scores[1]["fingerprint"]
    given = {
        "messages": CHAT["messages"],
        "answer": tuned["choices"][0]["message"]["content"],
        "end_of_turn": False,
    }
    again = [ask(two, "uncertainty", given | {"model": model}) for model in ("tuned", NAME)]
    assert [score["fingerprint"] for score in again] == [score["fingerprint"] for score in reversed(scores)]
    assert abs(again[0]["log_probability"] - again[1]["log_probability"]) > 0.1


def test_a_killed_scorer_is_replaced_for_both(two):
    first = scorer_of(two)
    first.kill()
    with ThreadPoolExecutor(8) as pool:  # none is lost, and those that can wait for the next scorer do
        responses = list(pool.map(lambda _: ask(two, "chat/completions", CHAT | {"max_tokens": 2}), range(8)))
    scores = [response["choices"][0]["uncertainty"] for response in responses]
    assert {score["status"] for score in scores} <= {"scored", "failed"}
    assert all(score["reason"] for score in scores if score["status"] == "failed")
    for _ in range(8):
        wait_for_scorer(two)
    assert scorer_of(two) != first
    for _ in range(4):
        assert ask(two, "chat/completions", CHAT)["choices"][0]["uncertainty"]["status"] == "scored"


def operate(two, method, path, body=None):
    headers = HEADERS | {"X-Gnuq-Operator-Key": OPERATOR_KEY}
    response = httpx.request(method, f"{two.base_url}/v1/uncertainty/{path}", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def scores_of(two, requests=8):
    """Of as many requests, each on a connection of its own, so that both processes are asked."""
    responses = [ask(two, "chat/completions", CHAT | {"max_tokens": 2}) for _ in range(requests)]
    return [response["choices"][0]["uncertainty"] for response in responses]


def test_the_operators_routes_stand_behind_both_keys(two):
    url = f"{two.base_url}/v1/uncertainty/switch"
    key = {"X-Gnuq-Operator-Key": OPERATOR_KEY}
    assert httpx.post(url, json={"scoring": False}, headers=key).status_code == 401
    assert httpx.post(url, json={"scoring": False}, headers=HEADERS).status_code == 403
    assert {score["status"] for score in scores_of(two, 4)} == {"scored"}


def test_the_switch_reaches_both_processes(two):
    assert operate(two, "POST", "switch", {"scoring": False})["scoring"] is False
    try:
        assert {score.get("reason") for score in scores_of(two)} == {"scoring is switched off by the operator"}
        assert sample(two, "gnuq_answers_total", route="chat", status="skipped", reason="switched_off") == 8
    finally:
        operate(two, "POST", "switch", {"scoring": True})
    assert {score["status"] for score in scores_of(two)} == {"scored"}


def test_reload_log_audit_and_labels(two, temp):
    """A calibration comes without a restart; its answers are drawn, logged and labelled, whoever answers."""
    log = Path(temp) / "scores.jsonl"
    log.rename(log.with_suffix(".old"))  # as logrotate does
    made = {"promises": (promise(0.1, 0.0),)}  # answers whatever comes
    calibrations = {"faq": saved(Path(temp), **made)}
    settings = {"yield_to_engine": True, "calibrations": calibrations, "audit_fraction": 1.0, "max_queue": 7}
    (Path(temp) / "gnuq.yaml").write_text(json.dumps(settings))
    name = made_calibration(**made).id
    assert operate(two, "POST", "reload") == {"calibrations": {"faq": name}, "wants_restart": ["max_queue"]}
    scores = scores_of(two)
    assert {score["calibration"] for score in scores} == {name}
    assert {score["decision"] for score in scores} == {"answer"}
    assert all(score["audit"] for score in scores)
    for number, score in enumerate(scores):
        label = {"index": 0, "correct": number != 3}
        assert operate(two, "POST", f"{score['id']}/feedback", label)["audit"] is True
    for _ in range(4):
        (report,) = operate(two, "GET", "audits")["audits"]
        assert (report["right"], report["wrong"], report["waiting"]) == (7, 1, 0)
    assert sample(two, "gnuq_audit_answers", calibration=name, label="right") == 7
    rows = [json.loads(line) for line in log.open()]
    assert sorted(row["id"] for row in rows) == sorted(score["id"] for score in scores)
    for row in rows:
        assert row["messages"] == CHAT["messages"]
        assert row["answer"]
        assert row["uncertainty"] in scores
        assert row["prompt_tokens"] > 5
    labelled = read_labels(Path(f"{log}.labels.sqlite"))
    assert [one.row for one in labelled if not one.correct] == [
        row for row in rows if row["id"] == scores[3]["id"]
    ]


def test_stopped_it_leaves_no_process_and_no_lock(two, temp):
    """The last of this file: it stops the server. vLLM may kill a process before it has removed its folder."""
    scorer = scorer_of(two)
    assert len(list(Path(temp).glob("gnuq-serve-*/scorer-*"))) == 1
    two._process.terminate()
    assert two._process.wait(60) is not None
    psutil.wait_procs([scorer], timeout=10)
    assert not scorer.is_running()
    assert all(ScorerFolder(path).abandoned() for path in Path(temp).glob("gnuq-serve-*/scorer-*"))
