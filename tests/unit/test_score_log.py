import json
import logging
import os
import threading
from pathlib import Path

import pytest

from gnuq_serve.calibration.questions import read_questions
from gnuq_serve.service.answer import Answer, AnswerText
from gnuq_serve.service.operator.score_log import ScoreLog
from gnuq_serve.service.requests.request_plan import DEFAULT_OPTIONS
from gnuq_serve.service.seeing.observation import Observation, RequestContext
from gnuq_serve.uncertainty import Uncertainty

CHAT = [{"role": "user", "content": "What is the capital of Fräncë?"}]


def scored(number=1, **changes):
    made = Uncertainty.scored(token_log_probabilities=[-0.5, -1.0], token_entropies=[0.1, 0.2], grad_norm_sq=3.0)
    return made.replace(id=f"unc-{number}", **changes)


def observation(uncertainty=None, question=CHAT, answer="Paris\nof course"):
    return Observation.of(
        (uncertainty or scored()).to_dict(),
        Answer([1, 2, 3], [4, 5], finish_reason="stop", text=AnswerText(question, answer)),
        DEFAULT_OPTIONS,
        RequestContext(route="chat", turns=1),
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scores.jsonl"


def test_one_line_for_each_scored_answer_without_text(path):
    log = ScoreLog(path)
    log.observe(observation(scored(1)))
    log.observe(observation(Uncertainty.skipped("full").replace(id="unc-2")))
    log.observe(observation(Uncertainty.failed("dead").replace(id="unc-3")))
    log.observe(observation(scored(4, audit=True)))
    log.close()
    first, last = lines(path)
    assert (first["id"], first["route"], first["correct"]) == ("unc-1", "chat", None)
    assert (first["prompt_tokens"], first["turns"], first["finish_reason"]) == (3, 1, "stop")
    assert first["uncertainty"] == scored(1).to_dict()
    assert last["uncertainty"]["audit"] is True
    assert "Paris" not in path.read_text()
    assert "capital" not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_calibrate_reads_it_and_labels_can_be_joined(path):
    log = ScoreLog(path, with_text=True)
    questions = [CHAT, "Once upon", [*CHAT, {"role": "assistant", "content": "It is"}], "  "]
    for number, question in enumerate(questions):
        log.observe(observation(scored(number), question))
    log.close()
    assert not any(question.labelled for question in read_questions(path))
    joined = [row | {"correct": row["id"] != "unc-1"} for row in lines(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in joined))
    read = read_questions(path)
    assert [question.correct for question in read] == [True, False, True, True]
    assert [question.uncertainty for question in read] == [scored(number) for number in range(4)]
    assert read[0].messages == tuple(CHAT)
    assert (read[0].answer, read[1].text) == ("Paris\nof course", "Once upon")
    # A beginning that was given, and a question of blanks, are no questions that `calibrate` could show.
    assert (read[2].messages, read[3].messages) == ((), ())
    assert read[0].extra["prompt_tokens"] == 3


def test_a_file_that_logrotate_moved_is_opened_anew(path, tmp_path):
    log = ScoreLog(path)
    log.write({"n": 1})
    while not path.exists() or not path.read_bytes():
        pass
    path.rename(tmp_path / "scores.jsonl.1")
    log.write({"n": 2})
    log.close()
    assert lines(tmp_path / "scores.jsonl.1") == [{"n": 1}]
    assert lines(path) == [{"n": 2}]


def test_writers_do_not_tear_each_others_lines(path):
    logs = [ScoreLog(path) for _ in range(4)]

    def work(log, name):
        for _ in range(100):
            log.write({"name": name, "filler": "x" * 2000})

    threads = [threading.Thread(target=work, args=(log, i)) for i, log in enumerate(logs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()
    assert len(lines(path)) == 400


def test_a_path_that_cannot_be_written_is_told_once_and_tried_again(tmp_path, caplog):
    folder = tmp_path / "later"
    with caplog.at_level(logging.ERROR):
        log = ScoreLog(folder / "scores.jsonl")
        log.write({"n": 1})
        log.write({"n": 2})
        while log._lines.qsize():
            pass
        folder.mkdir()
        log.write({"n": 3})
        log.close()
    assert lines(folder / "scores.jsonl")[-1] == {"n": 3}
    assert len([record for record in caplog.records if "score_log=" in record.getMessage()]) == 1


def test_a_full_disk_costs_lines(caplog):
    log = ScoreLog(Path("/dev/full"))
    log.write({"n": 1})
    log.close()
    assert "lines are lost" in caplog.text


def test_a_slow_disk_drops_lines_and_never_waits(tmp_path, caplog):
    path = tmp_path / "pipe"
    os.mkfifo(path)  # opening it for writing waits for a reader
    log = ScoreLog(path, capacity=3)
    for number in range(10):
        log.write({"n": number})
    assert "too slow" in caplog.text
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log.close()
    assert len(os.read(reader, 10_000).splitlines()) == 3
    os.close(reader)
