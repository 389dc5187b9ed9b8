"""`gnuq-serve calibrate` with a real model: over HTTP and in one process, the same answers and scores."""

import json
import os
import subprocess
import time
import urllib.request

import pytest
from live_server import ENV, GNUQ_SERVE, KEY

from gnuq_serve.calibration import Calibration

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
pytest.importorskip("sklearn")

# Easy and hard ones, so that some answers of a small model are right and some are wrong.
QA = [
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Bhutan?", "Thimphu"),
    ("What is the capital of Burkina Faso?", "Ouagadougou"),
    ("Who wrote Hamlet?", "Shakespeare"),
    ("Who wrote Buddenbrooks?", "Thomas Mann"),
    ("What is the chemical symbol for gold?", "Au"),
    ("What is the chemical symbol for tungsten?", "W"),
    ("What is 2 + 2?", "4"),
    ("What is 17 times 23?", "391"),
    ("Which planet is the largest?", "Jupiter"),
    ("How many moons does Mars have?", "two"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "qa.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answers": [a]}) + "\n" for q, a in QA))
    return path


def calibrate(data, name, *arguments):
    folder = data.parent / name
    folder.mkdir()
    command = [GNUQ_SERVE, "calibrate", "--data", str(data), "--max-tokens", "24", "--max-error", "0.5"]
    command += ["--out", str(folder / "c.json"), "--rows", str(folder / "rows.jsonl"), *arguments]
    run = subprocess.run(command, env=os.environ | ENV, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 3), run.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "rows.jsonl").open()]
    return run, rows, Calibration.load(folder / "c.json")


@pytest.fixture(scope="module")
def over_http(data, server):
    return calibrate(data, "http", "--server", server.base_url, "--api-key", KEY, "--concurrency", "4")


def test_questions_to_a_calibration(over_http):
    run, rows, calibration = over_http
    assert len(rows) == len(QA)
    assert all(row["uncertainty"]["status"] == "scored" for row in rows)
    assert rows[0]["correct"] is True  # "The capital of France is Paris."
    assert {row["correct"] for row in rows} == {True, False}
    assert calibration.fingerprint["scorer"] == rows[0]["uncertainty"]["fingerprint"]
    last = run.stdout.splitlines()[-1]
    assert "0.5" in last
    assert "gradient pass" in last


def test_a_finished_run_asks_nothing(data, over_http, server):
    def answers():
        request = urllib.request.Request(f"{server.base_url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("gnuq_answers_total{"))

    time.sleep(0.2)
    before = answers()
    assert before >= len(QA)
    work = data.parent / "http" / "c.work.jsonl"
    again = calibrate(data, "again", "--server", server.base_url, "--api-key", KEY, "--working-file", str(work))
    assert answers() == before
    assert again[1] == over_http[1]


def test_a_model_in_this_process_gives_the_same_rows(data, over_http, smollm2):
    engine = ["dtype=float32", "enforce_eager=true", "max_model_len=2048", "max_num_seqs=8"]
    options = [part for argument in engine for part in ("--engine-arg", argument)]
    run, rows, calibration = calibrate(data, "offline", "--model", str(smollm2), *options)
    for here, there in zip(rows, over_http[1], strict=True):
        assert here["correct"] == there["correct"]
        assert here["prompt_tokens"] == there["prompt_tokens"]
        assert here["finish_reason"] == there["finish_reason"]
        mine, served = here["uncertainty"], there["uncertainty"]
        assert mine["log_grad_norm_sq"] == pytest.approx(served["log_grad_norm_sq"], abs=1e-3)
    assert calibration.fingerprint == over_http[2].fingerprint
    # Nothing of the engine's own logs on standard output, nor after the last line.
    assert "held-out answers" in run.stdout.splitlines()[0]
    assert "gradient pass" in run.stdout.splitlines()[-1]


def test_answers_that_were_given_are_scored(data, smollm2):
    given = data.parent / "given.jsonl"
    places = ("Lyon", "Rome", "Berlin", "Paris", "Oslo", "Madrid", "Lima", "Cairo", "Delhi", "Minsk", "Quito")
    rows = [
        {"question": QA[0][0], "answer": f"The capital of France is {place}.", "correct": place == "Paris"}
        for place in places
    ]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--engine-arg", "dtype=float32", "--engine-arg", "enforce_eager=true"]
    options += ["--engine-arg", "max_model_len=2048"]
    _, scored, _ = calibrate(given, "given", "--model", str(smollm2), *options)
    likeliest = max(scored, key=lambda row: row["uncertainty"]["log_probability"])
    assert len(scored) == len(places)
    assert likeliest["correct"] is True
    assert [row["correct"] for row in scored].count(True) == 1
    # Six words, a full stop, and the end of the turn.
    assert likeliest["uncertainty"]["tokens"] == 8
