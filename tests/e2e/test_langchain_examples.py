"""The examples of examples/langchain, each as a user runs it, against a real server."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from live_server import KEY

from gnuq_serve.demo_model import NAME

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
pytest.importorskip("langchain.agents")
EXAMPLES = Path(__file__).parents[2] / "examples" / "langchain"
GOLD, FASO = "What is the chemical symbol for gold?", "What is the capital of Burkina Faso?"


@pytest.fixture
def launch(server):
    """``launch(script, arguments)``: the example as a process whose streams are pipes."""

    def launch(script, *arguments):
        env = os.environ | {"GNUQ_BASE_URL": f"{server.base_url}/v1", "GNUQ_API_KEY": KEY}
        command = [sys.executable, EXAMPLES / script, *arguments]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(command, env=env, text=True, **pipes)

    return launch


@pytest.fixture
def run(launch):
    """``run(script, arguments, typed)``: what the example prints."""

    def run(script, *arguments, typed=""):
        output, errors = launch(script, *arguments).communicate(typed, timeout=300)
        assert "Traceback" not in errors, errors
        return output

    return run


def test_the_chatbot_abstains_and_shows_no_draft(run):
    output = run("abstaining_chatbot.py", GOLD, FASO)
    assert re.search(r"bot> .*\bAu\b.*\n +\[probability 0\.8\d\d\]", output)
    assert re.search(r"bot> I don't know\.\n +\[normalized.probability 0\.\d+ < 0\.8\]", output)
    assert (
        run("abstaining_chatbot.py", "--answer-at", "0", typed=f"{GOLD}\n").count("bot> The chemical symbol") == 1
    )


def test_rag_answers_or_quotes_its_source(run):
    hours, food, delivery = run("rag_fallback.py").strip().split("\n\n")
    assert hours.splitlines()[1].startswith("A: The shop is open from 9 to 18 on weekdays")
    assert food.splitlines()[1] == "A: No, food is not taken back."
    assert re.fullmatch(
        r"A: I am not sure \(normalized.probability 0\.4\d+ < 0\.62\)\. Our page 'delivery' says: "
        r"Delivery costs 4 euros and is free from 50 euros on\. Parcels leave on the next working day\.",
        delivery.splitlines()[1],
    )


def test_an_uncertain_tool_call_waits_for_approval(run):
    held = r"held> refund\(\{'order': 'A17'\}\): Uncertain: normalized.probability 0\.0\d+ < 0\.8\n"
    approved = run("tool_gating.py", "--decide", "approve")
    assert re.search(held + "tool> refunding order A17\nbot> ", approved)
    rejected = run("tool_gating.py", "--model", NAME, typed="n\n")
    assert re.search(held, rejected)
    assert "refunding" not in rejected
    sure = run("tool_gating.py", "--answer-at", "0.001")
    assert "held>" not in sure
    assert "tool> refunding order A17\n" in sure


def test_the_small_model_hands_on_what_it_is_unsure_of(run, server):
    strong = ["--strong-base-url", f"{server.base_url}/v1", "--strong-api-key", KEY, "--strong-model", NAME]
    output = run("escalation.py", *strong)
    assert re.search(r"Q: .*gold\?\nA: .*\bAu\b.*\n   \[small model\]", output)
    assert re.search(
        r"Q: .*Faso\?\nA: .+\n   \[stronger model, since normalized.probability 0\.\d+ < 0\.8\]", output
    )
    assert output.endswith("1 of 2 questions went to the stronger model\n")


def test_a_killed_review_is_finished_by_another_process(launch, run, tmp_path):
    """A asks the model, and is killed while a person thinks; B finishes without asking the model again."""
    file = ["--db", str(tmp_path / "review.sqlite"), "--thread", "7"]
    first = launch("human_review.py", *file, FASO)
    before = []
    while not (before and before[-1].startswith("Your answer")):
        line = first.stdout.readline()
        assert line, first.stderr.read()
        before.append(line)
    first.kill()
    assert first.wait(timeout=30) == -9

    nowhere = ["--base-url", "http://127.0.0.1:9/v1", "--model", NAME]  # where no model could be asked
    after = run("human_review.py", *file, *nowhere, typed="Ouagadougou.\n").splitlines(keepends=True)
    assert after[:3] == before  # the same draft, reason and question
    assert after[3:] == [f"human> {FASO}\n", "ai> Ouagadougou.  [responded]\n"]

    # The same draft as the model gives, and approved this time.
    other = [*file[:3], "8"]
    draft = before[0].removeprefix("draft>").strip()
    assert run("human_review.py", *other, FASO, typed="\n").endswith(f"ai> {draft}  [approved]\n")
    assert "nothing waits" in launch("human_review.py", *other).communicate(timeout=60)[1]
