"""`gnuq-serve calibrate`, really run, on scored rows: no model."""

import csv
import json

import pytest
from scored_rows import questions, scored_rows, write

from gnuq_serve import Uncertainty
from gnuq_serve.calibration import Calibration
from gnuq_serve.cli import main

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("in_empty_folder")


def calibrate(*arguments):
    return main(["calibrate", *map(str, arguments)])


def test_scored_rows_give_a_calibration_with_a_promise(tmp_path, capsys):
    rows = scored_rows(400, base=3.0)
    data = write(tmp_path / "log.jsonl", rows)
    code = calibrate("--data", data, "--out", "faq.json", "--max-error", "0.2", "--confidence", "0.9")
    out = capsys.readouterr().out
    assert code == 0, out
    calibration = Calibration.load("faq.json")
    assert calibration.name == "faq"
    assert calibration.levels == (0.2,)
    last = out.splitlines()[-1]
    assert "At most 0.2 errors among answered questions, with confidence 0.9" in last
    assert "gradient pass" in last

    threshold = calibration.threshold_for(0.2)
    decided = [
        calibration.apply(
            Uncertainty.from_dict(row["uncertainty"]),
            prompt_tokens=row["prompt_tokens"],
            finish_reason=row["finish_reason"],
        )
        for row in rows
    ]
    assert {u.decision for u in decided if u.p_correct >= threshold} == {"answer"}
    assert "answer" not in {u.decision for u in decided if u.p_correct < threshold}
    # What was seen is bound: here prompts of 20 to 26 tokens that ended with "stop".
    assert calibration.apply(Uncertainty.from_dict(rows[0]["uncertainty"]), prompt_tokens=99).p_correct is None


def test_no_threshold_is_a_normal_outcome_with_its_own_exit_code(tmp_path, capsys):
    data = write(tmp_path / "log.jsonl", scored_rows(120, base=-0.5, slope=0.0))
    assert calibrate("--data", data, "--max-error", "0.1") == 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert "No threshold keeps errors under 0.1" in last
    assert "the best that this data supports is" in last
    assert Calibration.load("calibration.json").threshold_for(0.1) is None


def test_several_levels_are_told_apart(tmp_path, capsys):
    data = write(tmp_path / "log.jsonl", scored_rows(400, base=1.0))
    assert calibrate("--data", data, "--max-error", "0.35", "0.001") == 3
    *_, found, missing, last = capsys.readouterr().out.splitlines()
    assert found.startswith("At most 0.35 errors")
    assert missing.startswith("No threshold keeps errors under 0.001")
    assert last.startswith("A threshold keeps errors under 0.35. None reaches 0.001. ")
    assert "gradient pass" in last


def test_fifty_rows_are_enough_to_be_told_what_they_support(tmp_path, capsys):
    data = write(tmp_path / "log.jsonl", [{**row, "correct": True} for row in scored_rows(50)])
    assert calibrate("--data", data, "--max-error", "0.1") == 0  # 30 held out, 29 are the least
    assert calibrate("--data", data, "--max-error", "0.05") == 3
    assert "59 answers without an error" in capsys.readouterr().out.splitlines()[-1]


def test_neither_the_calibration_nor_the_rows_hold_text(tmp_path):
    rows = scored_rows(80)
    data = write(tmp_path / "log.jsonl", rows)
    calibrate("--data", data, "--rows", "rows.jsonl", "--group", "question")
    for name in ("calibration.json", "rows.jsonl"):
        text = (tmp_path / name).read_text()
        assert not any(word in text for word in ("Question ", "Answer ", "Reference "))


def test_rows_written_are_rows_read(tmp_path):
    data = write(tmp_path / "log.jsonl", scored_rows(120, groups=60))
    same = ["--out", "a.json", "--name", "same"]
    calibrate("--data", data, "--group", "conversation", "--rows", "rows.jsonl", *same)
    first = Calibration.load("a.json").id
    calibrate("--data", "rows.jsonl", "--group", "group", *same)
    assert Calibration.load("a.json").id == first
    calibrate("--data", "rows.jsonl", *same)  # without groups, another split
    assert Calibration.load("a.json").id != first


def test_csv_as_a_spreadsheet_saves_it(tmp_path):
    rows = scored_rows(120)
    with (tmp_path / "log.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {**row, "uncertainty": json.dumps(row["uncertainty"]), "answers": row["answers"][0]} for row in rows
        )
    calibrate("--data", "log.csv", "--rows", "a.jsonl", "--collect-only")
    calibrate("--data", write(tmp_path / "log.jsonl", rows), "--rows", "b.jsonl", "--collect-only")
    from_csv, from_json = ((tmp_path / name).read_text().splitlines() for name in ("a.jsonl", "b.jsonl"))
    assert len(from_csv) == 120
    assert [json.loads(row) | {"key": None} for row in from_csv] == [
        json.loads(row) | {"key": None} for row in from_json
    ]


def test_answers_that_were_scored_are_matched_where_no_label_stands(tmp_path):
    rows = scored_rows(60)
    for index, row in enumerate(rows):
        del row["correct"]
        row["answer"] = f"It is reference {index if index % 4 else 'X'}"
    data = write(tmp_path / "log.jsonl", rows)
    assert calibrate("--data", data, "--rows", "rows.jsonl", "--collect-only") == 0
    labels = [json.loads(line)["correct"] for line in (tmp_path / "rows.jsonl").open()]
    assert labels == [bool(index % 4) for index in range(60)]
    assert not (tmp_path / "calibration.json").exists()


def test_unlabelled_and_unscored_rows_are_left_out_and_counted(tmp_path, capsys):
    rows = scored_rows(100)
    for row in rows[:10]:
        row["correct"] = None
        del row["answers"]
    for row in rows[10:15]:
        row["uncertainty"] = {"status": "skipped", "reason": "the queue is full"}
    calibrate("--data", write(tmp_path / "log.jsonl", rows), "--rows", "rows.jsonl", "--collect-only")
    told = capsys.readouterr().err
    assert "85 of 100 questions gave a scored and labelled answer" in told
    assert "10 left out (not labelled)" in told
    assert "5 left out (skipped: the queue is full)" in told
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 85


def test_a_limit_is_a_random_part_that_grows(tmp_path):
    data = write(tmp_path / "log.jsonl", scored_rows(200))

    def lines(limit, seed=0):
        calibrate("--data", data, "--limit", limit, "--seed", seed, "--rows", "r.jsonl", "--collect-only")
        return [int(json.loads(line)["key"]) for line in (tmp_path / "r.jsonl").open()]

    few, more = lines(20), lines(80)
    assert len(few) == 20
    assert few == sorted(few) != list(range(1, 21))
    assert set(few) < set(more)
    assert lines(20, seed=1) != few


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "3 of 3 rows carry no `uncertainty`: name a model with --server URL or --model PATH"),
        (["--server", "http://127.0.0.1:9"], "is the server up"),
        (["--max-error", "10"], "--max-error 10 must be a share between 0 and 1, such as 0.1"),
        (["--confidence", "95"], "--confidence 95 must be a share"),
        (["--match", "judge"], "--match judge needs --judge-model"),
        (["--collect-only"], "--collect-only needs --rows"),
        (["--out", "nowhere/a.json"], "there is no folder nowhere"),
        (["--group", "topic"], "line 1: `topic` is missing"),
        (["--match", "choice"], "line 1: the matcher `choice` needs `choices` and `label`"),
        (["--semantic"], "go with --server"),
        (["--server", "x", "--request", "[1]"], "--request must be a JSON object"),
        (["--model", "x", "--engine-arg", "dtype"], "write NAME=VALUE"),
    ],
)
def test_a_mistake_is_answered_with_the_remedy(tmp_path, capsys, arguments, message):
    data = write(tmp_path / "qa.jsonl", questions(3))
    assert calibrate("--data", data, *arguments) == 1
    assert message in capsys.readouterr().err
