"""One question, asked offline, over HTTP and through LangChain: one number. And the engine agrees on l."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from langchain_gnuq import UncertaintyCallbackHandler
from live_server import ENV, NAME, chat_openai
from made_calibration import saved

from gnuq_serve import Policy, Uncertainty

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

QUESTIONS = ["What is the capital of France?", "What is 7 + 5?", "Who painted the Mona Lisa?", "Say yes."]


@pytest.fixture(scope="module")
def ask_offline(smollm2, tmp_path_factory):
    """``ask_offline(scorer_weights)``: the questions, answered and scored by `UncertaintyLLM`."""
    bound = {"sampling": "temperature=0 top_p=1 max_tokens=24", "system_prompt": "none", "template": "default"}
    calibration = saved(tmp_path_factory.mktemp("calibration"), fingerprint=bound)
    script = Path(__file__).with_name("offline_answers.py")

    def ask(scorer_weights):
        run = subprocess.run(
            [sys.executable, str(script), str(smollm2), scorer_weights, calibration, *QUESTIONS],
            env=os.environ | ENV,
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
        assert lines, run.stdout[-3000:] + run.stderr[-3000:]
        return json.loads(lines[-1].removeprefix("RESULT "))

    return ask


@pytest.fixture(scope="module")
def offline(ask_offline):
    return ask_offline("checkpoint")


def chat(client, question, **options):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=24, **options)


@pytest.mark.parametrize("index", range(len(QUESTIONS)))
def test_offline_http_and_langchain_agree(offline, client, server, index):
    choice = chat(client, QUESTIONS[index]).choices[0]
    assert choice.message.content == offline[index]["text"]
    over_http = choice.model_extra["uncertainty"]
    assert over_http["status"] == "scored"
    assert choice.logprobs.model_extra["uncertainty"] == over_http

    policy = Policy(signal="normalized.probability", answer=0.8, escalate=0.6, otherwise="human")
    model = chat_openai(server, max_tokens=24, callbacks=[UncertaintyCallbackHandler(policy=policy)])
    in_langchain = model.invoke(QUESTIONS[index]).response_metadata["uncertainty"]
    assert in_langchain["decision"] in {"answer", "escalate", "human"}
    assert in_langchain["calibration"] == "uncalibrated"
    assert over_http["decision"] is None

    numbers = [u["log_grad_norm_sq"] for u in (offline[index]["uncertainty"], over_http, in_langchain)]
    assert max(numbers) - min(numbers) <= 1e-4
    assert {u["fingerprint"] for u in (offline[index]["uncertainty"], over_http, in_langchain)} == {
        over_http["fingerprint"]
    }


@pytest.mark.parametrize("question", QUESTIONS)
def test_scorer_and_engine_agree_on_the_log_probability(client, question):
    choice = chat(client, question, logprobs=True).choices[0]
    uncertainty = Uncertainty.from_dict(choice.model_extra["uncertainty"])
    engine = math.fsum(token.logprob for token in choice.logprobs.content)
    assert uncertainty.tokens == len(choice.logprobs.content)
    assert uncertainty.log_probability == pytest.approx(engine, abs=1e-2)
    assert uncertainty.warnings == ()


def test_offline_leaves_what_was_asked_of_vllm(offline):
    *chats, two, _ = offline
    assert all(row["logprobs_restored"] for row in chats)
    assert len(two) == 2
    for scored, served in two:
        assert scored == pytest.approx(served, abs=1e-2)


def test_offline_by_the_engines_own_weights(offline, ask_offline):
    """The worker scores on its tensors, and gives the copy's numbers."""
    *chats, two, warnings = ask_offline("shared")
    assert warnings == offline[-1]
    for found, expected in zip(chats, offline, strict=False):
        assert (found["text"], found["token_ids"]) == (expected["text"], expected["token_ids"])
        assert found["logprobs_restored"]
        ours, theirs = found["uncertainty"], expected["uncertainty"]
        assert ours["status"] == theirs["status"] == "scored"
        for name in ("mode", "tokens", "fingerprint", "warnings", "decision", "calibration"):
            assert ours[name] == theirs[name], name
        for name in ("log_probability", "entropy", "log_epistemic", "log_grad_norm_sq", "p_correct"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
    for scored, served in two:
        assert scored == pytest.approx(served, abs=1e-2)


def test_offline_a_calibration_decides_on_answers_made_as_its_own(offline):
    *chats, _, warnings = offline
    assert {row["uncertainty"]["decision"] for row in chats} <= {"answer", "abstain"}
    assert all(0 < row["uncertainty"]["p_correct"] < 1 for row in chats)
    for (warning,) in warnings:  # drawn otherwise, and no chat
        assert "sampling is temperature=1 top_p=1 max_tokens=4, calibrated on temperature=0" in warning
        assert "template is no chat, calibrated on default" in warning
