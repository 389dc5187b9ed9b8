"""`gnuq-serve evaluate` against a real server: methods, costs and two ways to the same number."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
from live_server import CHAT, ENV, GNUQ_SERVE, KEY, ask

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
pytest.importorskip("sklearn")

QUESTIONS = Path(__file__).parents[1] / "questions"
METHODS = "nll,mean_nll,aleatoric,epistemic,semgrad,p_true,verbalized,self_consistency,semantic_entropy"


def evaluate(server, out, data, methods, *arguments):
    command = [GNUQ_SERVE, "evaluate", "--server", server.base_url, "--api-key", KEY, "--out", str(out)]
    command += ["--data", data, "--methods", methods, "--timed", "1", "--resamples", "100", *arguments]
    run = subprocess.run(command, env=os.environ | ENV, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in (out / "rows.jsonl").open()]
    results = json.loads((out / "results.json").read_text())
    return run.stdout, rows, {one["name"]: one for one in results["sets"]}


@pytest.fixture(scope="module")
def found(server, tmp_path_factory):
    data = f"{QUESTIONS / 'facts.jsonl'},{QUESTIONS / 'myths.jsonl'}"
    out = tmp_path_factory.mktemp("evaluate")
    return out, evaluate(server, out, data, METHODS, "--max-tokens", "16", "--samples", "3", "--limit", "6")


def test_every_method_has_a_value_and_a_cost(found):
    out, (printed, rows, sets) = found
    assert len(rows) == 12
    for name, one in sets.items():
        assert one["answers"] == 6
        assert f"{name}: {one['right']} of 6 answers right" in printed
        costs = {method["name"]: method["cost"] for method in one["methods"]}
        assert list(costs) == METHODS.split(",")
        assert costs["nll"]["passes"] == ""
        assert costs["epistemic"]["seconds"] > 0
        assert costs["p_true"]["seconds"] > 0
    assert all(
        row["values"][name] is not None for row in rows for name in METHODS.split(",") if name != "verbalized"
    )
    assert all(0 <= row["values"]["p_true"] <= 1 for row in rows)
    samples = {method["name"]: method["cost"]["samples"] for method in sets["facts:open"]["methods"]}
    assert samples["semantic_entropy"] == 3
    assert (out / "report.html").stat().st_size > 10_000


def test_the_answers_and_scores_are_those_of_a_chat(found, server):
    out, (_, rows, _) = found
    row = next(row for row in rows if row["set"] == "facts:open")
    question = json.loads((QUESTIONS / "facts.jsonl").read_text().splitlines()[row["line"] - 1])["question"]
    chat = {**CHAT, "messages": [{"role": "user", "content": question}], "max_tokens": 16}
    (choice,) = ask(server, "chat/completions", chat)["choices"]
    assert row["values"]["nll"] == pytest.approx(-choice["uncertainty"]["log_probability"], abs=1e-3)
    assert row["values"]["epistemic"] == pytest.approx(choice["uncertainty"]["log_epistemic"], abs=1e-2)
    work = [json.loads(line) for line in (out / "work.jsonl").open()]
    answers = {line["key"]: line["result"] for line in work if line.get("step") == "answer"}
    assert answers[row["key"]]["text"] == choice["message"]["content"].strip()


def test_the_likelihood_of_a_choice_is_the_scorers(found):
    """vLLM's log-probabilities of the chosen text, its end included, against those of the gradient pass."""
    out, (_, rows, _) = found
    work = [json.loads(line) for line in (out / "work.jsonl").open()]
    answers = {line["key"]: line["result"] for line in work if line.get("step") == "answer"}
    chosen = [row for row in rows if row["set"] == "myths:binary"]
    assert len(chosen) == 6
    for row in chosen:
        totals = answers[row["key"]]["choice_log_probabilities"]
        assert row["values"]["nll"] == pytest.approx(-max(totals), abs=1e-3)
        doubt = 1 - 1 / sum(math.exp(total - max(totals)) for total in totals)
        assert row["values"]["self_consistency"] == pytest.approx(doubt)


def test_few_shot_prompts_end_with_their_line(server, tmp_path):
    _, rows, _ = evaluate(
        server, tmp_path, str(QUESTIONS / "sums.jsonl"), "nll,p_true", "--few-shot", "3", "--max-tokens", "8"
    )
    assert len(rows) == 5
    work = [json.loads(line) for line in (tmp_path / "work.jsonl").open()]
    answers = [line["result"] for line in work if line.get("step") == "answer"]
    # The line's end is among the tokens that are scored, and not in the text.
    assert any(answer["finish_reason"] == "stop" for answer in answers)
    assert all("\n" not in answer["text"] for answer in answers)
