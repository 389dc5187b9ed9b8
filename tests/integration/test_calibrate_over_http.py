"""`gnuq-serve calibrate` with questions: over real HTTP, against a scripted server, killed and gone on with."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from openai_stub import OpenAIStub, score
from scored_rows import questions, write

from gnuq_serve.calibration import Calibration
from gnuq_serve.cli import main

pytestmark = pytest.mark.usefixtures("in_empty_folder")


def number_in(request):
    return int(request["messages"][-1]["content"].split()[2])


def adds(request):
    """Right for two numbers of three; each has its own score."""
    n = number_in(request)
    return {"text": f"It is {n + (1 if n % 3 else 2)}.", "uncertainty": score(n)}


def calibrate(*arguments):
    return main(["calibrate", *map(str, arguments)])


def test_questions_are_asked_matched_and_calibrated(tmp_path, capsys):
    data = write(tmp_path / "qa.jsonl", questions(60))
    with OpenAIStub(adds) as server:
        ask = ["--server", server.url, "--match", "number", "--system", "Be brief.", "--max-tokens", "12"]
        code = calibrate("--data", data, *ask, "--rows", "rows.jsonl", "--max-error", "0.9")
    assert code in (0, 3), capsys.readouterr()
    assert sorted(server.asked()) == sorted(row["question"] for row in questions(60))
    path, request = server.requests[0]
    assert path == "/v1/chat/completions"
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (request["temperature"], request["max_tokens"], request["model"]) == (0.0, 12, "tiny")
    assert request["uncertainty"] == {"wait": True}
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").open()]
    assert [row["correct"] for row in rows] == [bool(n % 3) for n in range(60)]
    assert [row["uncertainty"]["log_probability"] for row in rows] == [
        score(n)["log_probability"] for n in range(60)
    ]
    assert {(row["prompt_tokens"], row["turns"], row["finish_reason"]) for row in rows} == {(17, 1, "stop")}
    fingerprint = Calibration.load("calibration.json").fingerprint
    assert fingerprint["scorer"] == "f1f1"
    assert fingerprint["sampling"] == "temperature=0 top_p=1 max_tokens=12"
    assert len(fingerprint["system_prompt"]) == 12


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_where_it_was(tmp_path, how):
    data = write(tmp_path / "qa.jsonl", questions(60))
    command = [sys.executable, "-m", "gnuq_serve.cli", "calibrate", "--data", data, "--match", "number"]
    with OpenAIStub(adds, delay=0.05) as server:
        command += ["--server", server.url, "--concurrency", "2", "--rows", "rows.jsonl", "--collect-only"]
        with subprocess.Popen(command, env=os.environ, start_new_session=True) as run:
            while len(server.requests) < 12:
                assert run.poll() is None
                time.sleep(0.01)
            os.killpg(run.pid, how)
            assert run.wait() == (-signal.SIGKILL if how == signal.SIGKILL else 130)
        assert not (tmp_path / "rows.jsonl").exists()
        work = tmp_path / "calibration.work.jsonl"
        with work.open("ab") as file:
            file.write(b'{"key": "torn in the mid')  # as a kill between two writes may leave it
        kept = len(work.read_bytes().splitlines()) - 2
        before = len(server.asked())
        assert before - 2 <= kept <= before < 60
        subprocess.run(command, env=os.environ, check=True)
        again = server.asked()[before:]
    assert len(again) == len(set(again)) == 60 - kept
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").open()]
    assert [row["correct"] for row in rows] == [bool(n % 3) for n in range(60)]


def test_a_changed_question_is_asked_anew_and_a_changed_setting_is_refused(tmp_path, capsys):
    rows = questions(20)
    with OpenAIStub(adds) as server:
        ask = ["--server", server.url, "--match", "number", "--rows", "rows.jsonl", "--collect-only"]
        assert calibrate("--data", write(tmp_path / "qa.jsonl", rows), *ask) == 0
        rows[3]["question"] = "What is 900 + 1?"
        rows[4]["answers"] = ["999"]  # another reference is another label, not another question
        assert calibrate("--data", write(tmp_path / "qa.jsonl", rows), *ask) == 0
        assert server.asked()[20:] == ["What is 900 + 1?"]
        assert "1 of them belong to no question of this run" in capsys.readouterr().err
        labels = [json.loads(line)["correct"] for line in (tmp_path / "rows.jsonl").open()]
        assert labels[3:5] == [False, False]
        assert calibrate("--data", tmp_path / "qa.jsonl", *ask, "--temperature", "0.7") == 1
    message = capsys.readouterr().err
    assert "temperature was 0.0, is 0.7" in message
    assert "--working-file" in message
    assert len(server.asked()) == 21


def test_repeated_questions_count_once(tmp_path, capsys):
    with OpenAIStub(adds) as server:
        data = write(tmp_path / "qa.jsonl", questions(10) * 2)
        calibrate("--data", data, "--server", server.url, "--rows", "rows.jsonl", "--collect-only")
    assert len(server.asked()) == 10
    assert "10 questions stand in the data twice" in capsys.readouterr().err
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 10


def test_choices_are_shown_shuffled_and_read_by_letter_or_text(tmp_path):
    choices = ["the right one", "a wrong one", "another", "none"]

    def reply(request):
        content = request["messages"][-1]["content"]
        letter = next(line[0] for line in content.splitlines() if line.endswith("the right one"))
        n = int(content.split()[1])
        return {"text": [letter, "The right one.", "B or C", ""][n % 4], "uncertainty": score(n)}

    rows = [{"question": f"Question {n} ?", "choices": choices, "label": 0} for n in range(40)]
    with OpenAIStub(reply) as server:
        ask = ["--server", server.url, "--match", "choice", "--rows", "rows.jsonl", "--collect-only"]
        assert calibrate("--data", write(tmp_path / "qa.jsonl", rows), *ask) == 0
    labels = [json.loads(line)["correct"] for line in (tmp_path / "rows.jsonl").open()]
    assert labels == [n % 4 < 2 for n in range(40)]


def test_answers_without_a_score_are_asked_again_next_time(tmp_path, capsys):
    full = True

    def reply(request):
        answer = adds(request)
        if full and number_in(request) < 5:
            answer["uncertainty"] = {"status": "skipped", "reason": "the queue is full"}
        return answer

    data = write(tmp_path / "qa.jsonl", questions(12))
    with OpenAIStub(reply) as server:
        ask = ["--data", data, "--server", server.url, "--rows", "rows.jsonl", "--collect-only"]
        calibrate(*ask)
        assert "5 left out (skipped: the queue is full)" in capsys.readouterr().err
        full = False
        calibrate(*ask)
    assert len(server.asked()) == 12 + 5
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 12


def test_a_question_that_the_server_refuses_costs_only_itself(tmp_path, capsys):
    def reply(request):
        if number_in(request) == 7:
            return {"status": 400, "error": "the prompt is too long"}
        return adds(request)

    data = write(tmp_path / "qa.jsonl", questions(20))
    with OpenAIStub(reply) as server:
        ask = ["--server", server.url, "--rows", "rows.jsonl", "--collect-only"]
        assert calibrate("--data", data, *ask) == 0
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 19
    assert "the prompt is too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (lambda _: {"text": "5"}, "carry no `uncertainty`: start it with `gnuq-serve serve`"),
        (lambda _: {"status": 400, "error": "no such option"}, "refuses every question.*no such option"),
        (lambda _: {"status": 401, "error": "wrong key"}, "wrong key.*OPENAI_API_KEY"),
    ],
)
def test_a_server_that_cannot_be_used_ends_the_run_early(tmp_path, capsys, reply, message):
    data = write(tmp_path / "qa.jsonl", questions(100))
    with OpenAIStub(reply) as server:
        assert calibrate("--data", data, "--server", server.url) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert len(server.asked()) <= 20
    assert re.search(message, error), error


def test_another_scorer_behind_the_same_server_is_noticed(tmp_path, capsys):
    def reply(request):
        n = number_in(request)
        return {"text": "1", "uncertainty": score(n, fingerprint="f1f1" if n < 10 else "f2f2")}

    data = write(tmp_path / "qa.jsonl", questions(40))
    with OpenAIStub(reply) as server:
        assert calibrate("--data", data, "--server", server.url, "--concurrency", "1") == 1
    assert "the scorer changed (fingerprints f1f1, f2f2)" in capsys.readouterr().err
    assert len(server.asked()) == 11


def test_several_models_need_a_name(tmp_path, capsys):
    data = write(tmp_path / "qa.jsonl", questions(3))
    with OpenAIStub(adds, models=("a", "b")) as server:
        assert calibrate("--data", data, "--server", server.url) == 1
        assert "serves a, b; name one with --served-model" in capsys.readouterr().err
        ask = ["--server", server.url + "/v1/", "--served-model", "b", "--semantic", "--mode", "exact"]
        assert calibrate("--data", data, *ask, "--rows", "r", "--collect-only", "--request", '{"seed": 3}') == 0
    request = server.requests[0][1]
    assert (request["model"], request["seed"]) == ("b", 3)
    assert request["uncertainty"] == {"wait": True, "mode": "exact", "semantic": True}


def test_given_answers_are_scored_by_the_server(tmp_path):
    def reply(request):
        return {"status": 200, "body": score(len(request["answer"]))}

    rows = [{"question": f"Q{n}?", "answer": "x" * n, "correct": n % 2} for n in range(1, 13)]
    with OpenAIStub(reply) as server:
        ask = ["--server", server.url, "--rows", "rows.jsonl", "--collect-only"]
        assert calibrate("--data", write(tmp_path / "qa.jsonl", rows), *ask) == 0
    path, request = server.requests[0]
    assert path == "/v1/uncertainty"
    assert set(request) == {"model", "messages", "answer", "uncertainty"}
    assert request["uncertainty"] == {"wait": True}
    assert request["messages"] == [{"role": "user", "content": f"Q{len(request['answer'])}?"}]
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").open()]
    assert [row["correct"] for row in written] == [bool(n % 2) for n in range(1, 13)]
    assert [row["uncertainty"]["tokens"] for row in written] == [score(n)["tokens"] for n in range(1, 13)]


# A judge


def judged(request):
    """Accepts answers that end in an even digit, and says nothing useful about a seven."""
    case = request["messages"][-1]["content"]
    answer = json.loads(case[case.index("{") : case.rindex("}") + 1])["answer"]
    digit = int(answer.rstrip(".")[-1])
    return {"text": "Who knows" if digit == 7 else "CORRECT" if digit % 2 == 0 else "INCORRECT"}


def test_a_judge_labels_and_is_itself_measured(tmp_path, capsys):
    data = write(tmp_path / "qa.jsonl", questions(20))
    by_hand = [
        {"question": "q", "answers": ["2"], "answer": f"a {n}", "correct": n in (2, 4, 5)} for n in range(7)
    ]
    sample = write(tmp_path / "sample.jsonl", by_hand)
    answered = [adds({"messages": [{"content": row["question"]}]})["text"] for row in questions(20)]
    with OpenAIStub(adds) as server, OpenAIStub(judged) as judge:
        ask = ["--data", data, "--server", server.url, "--rows", "rows.jsonl", "--collect-only"]
        ask += ["--match", "judge", "--judge-server", judge.url, "--judge-model", "big", "--judge-sample", sample]
        assert calibrate(*ask) == 0
        told = capsys.readouterr().err
        verdicts = len(judge.asked())
        assert verdicts == 7 + 20
        calibrate(*ask)  # verdicts are kept but for those that were none; the sample is small and asked again
        unclear = sum(text.rstrip(".")[-1] == "7" for text in answered)
        assert len(judge.asked()) == verdicts + 7 + unclear
    # Wrong by hand: 0, 1, 3, 6, of which 0 and 6 are accepted; right: 2, 4, 5, of which 5 is rejected.
    assert "called right 2 of 4" in told
    assert "wrong 1 of 3" in told
    assert f"{unclear} left out (the judge gave no verdict)" in told
    labels = [json.loads(line)["correct"] for line in (tmp_path / "rows.jsonl").open()]
    digits = [int(text.rstrip(".")[-1]) for text in answered]
    assert labels == [digit % 2 == 0 for digit in digits if digit != 7]


def test_a_judge_that_was_not_measured_is_said_to_be_so(tmp_path, capsys):
    data = write(tmp_path / "qa.jsonl", questions(40))
    with OpenAIStub(adds) as server, OpenAIStub(judged) as judge:
        ask = ["--data", data, "--server", server.url, "--match", "judge", "--judge-model", "big"]
        calibrate(*ask, "--judge-server", judge.url, "--report", "report")
    assert "the judge's own error was not measured" in capsys.readouterr().out
    assert "the judge&#39;s own error was not measured" in (tmp_path / "report" / "report.html").read_text()


def test_a_working_file_is_never_overwritten_by_mistake(tmp_path, capsys):
    data = write(tmp_path / "qa.jsonl", questions(3))
    before = (tmp_path / "qa.jsonl").read_bytes()
    with OpenAIStub(adds) as server:
        assert calibrate("--data", data, "--server", server.url, "--working-file", data) == 1
    assert "not a line of a working file" in capsys.readouterr().err
    assert (tmp_path / "qa.jsonl").read_bytes() == before


def test_a_server_that_holds_answers_back_is_refused(tmp_path, capsys):
    def gated(request):
        return {"text": "I am not sure.", "uncertainty": score(number_in(request)) | {"withheld": "uncertain"}}

    data = write(tmp_path / "qa.jsonl", questions(30))
    with OpenAIStub(gated) as server:
        assert calibrate("--data", data, "--server", server.url) == 1
    assert (
        "holds answers back, and shows none of them: calibrate with on_uncertain: pass" in capsys.readouterr().err
    )


def test_further_fields_of_the_request_are_bound_too(tmp_path):
    data = write(tmp_path / "qa.jsonl", questions(60))
    with OpenAIStub(adds) as server:
        ask = ["--server", server.url, "--match", "number", "--request", '{"top_k": 5, "temperature": 0.5}']
        calibrate("--data", data, *ask)
    fingerprint = Calibration.load("calibration.json").fingerprint
    assert fingerprint["sampling"] == "temperature=0.5 top_p=1 max_tokens=256 top_k=5"
    assert (fingerprint["system_prompt"], fingerprint["template"]) == ("none", "default")
