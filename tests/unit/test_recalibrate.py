"""`gnuq-serve recalibrate`, really run, on labels as a server keeps them."""

import dataclasses
import json
from pathlib import Path

import pytest
from scored_rows import scored_rows, write

from gnuq_serve import Calibration, Uncertainty
from gnuq_serve.calibration.rows import Row
from gnuq_serve.cli import main
from gnuq_serve.service.operator.label_store import LabelledAnswer, LabelStore

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("in_empty_folder")

PARTS = {"sampling": "temperature=0 top_p=1 max_tokens=64", "system_prompt": "none", "template": "default"}
FLAGS = ["--max-error", "0.3", "--confidence", "0.9", "--out", "new.json"]


def log_rows(count, **made):
    """Rows as the server's log has them, and their true labels."""
    rows, labels = [], []
    for number, row in enumerate(scored_rows(count, **made)):
        name = f"unc-{made.get('seed', 0)}-{number}"
        labels.append(row["correct"])
        rows.append(
            {
                "id": name,
                "time": f"2026-11-26T10:00:{number:06}",
                "correct": None,
                "prompt_tokens": row["prompt_tokens"],
                "turns": 1,
                "finish_reason": "stop",
                "parts": PARTS | ({"system_prompt": "abc"} if number % 2 else {}),
                "uncertainty": row["uncertainty"] | {"id": name, "audit": True},
            }
        )
    return rows, labels


def kept(path, rows, labels, *, audit=True):
    store = LabelStore(path)
    for row, correct in zip(rows, labels, strict=True):
        store.mark(
            LabelledAnswer(
                id=row["id"],
                audit=audit,
                decision=None,
                calibration=None,
                max_error=None,
                row=row,
                correct=correct,
            )
        )
    store.close()
    return path


def recalibrate(*arguments):
    return main(["recalibrate", *map(str, arguments), *FLAGS])


def test_labels_of_the_audit_give_a_calibration_and_volunteered_ones_do_not_count(tmp_path, capsys):
    rows, labels = log_rows(200, base=3.0)
    kept(tmp_path / "labels.sqlite", rows, labels)
    complaints, _ = log_rows(50, seed=1)
    kept(tmp_path / "labels.sqlite", complaints, [False] * 50, audit=False)
    assert recalibrate("--labels", tmp_path / "labels.sqlite") == 0
    err = capsys.readouterr().err
    assert "200 labelled answers of the audit" in err
    assert "50 volunteered labels left out" in err
    made = Calibration.load("new.json")
    assert made.data.rows == 200
    assert made.data.accuracy == sum(labels) / 200
    assert made.threshold_for(0.3) is not None
    # Bound to what all rows have in common; they differ in the system prompt.
    bound = {"scorer": "f1f1", "mode": "exact", "span": "answer"}
    assert made.fingerprint == bound | {"sampling": PARTS["sampling"], "template": "default"}
    assert made.seen.prompt_tokens == (20, 26)


def test_labels_by_hand_in_rotated_logs(tmp_path, capsys):
    rows, labels = log_rows(120, base=2.0)
    for row, correct in zip(rows, labels, strict=True):
        row["correct"] = correct
    rows[3]["correct"] = None  # not labelled yet
    del rows[4]["uncertainty"]["audit"]  # somebody labelled what was not drawn
    logs = [write(tmp_path / "a.jsonl.1", rows[:70]), write(tmp_path / "a.jsonl", rows[70:])]
    store = kept(tmp_path / "labels.sqlite", rows[5:6], [not labels[5]])
    recalibrate("--labels", store, "--log", *logs, "--rows", "rows.jsonl")
    err = capsys.readouterr().err
    assert "118 labelled answers of the audit" in err
    assert "1 volunteered labels left out" in err
    written = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert len(written) == 118
    by_id = {row["uncertainty"]["id"]: row["correct"] for row in written}
    assert by_id["unc-0-5"] is (not labels[5])  # a label of the store goes before one in the log
    assert by_id["unc-0-0"] is labels[0]


def test_another_model_is_left_out_and_the_newest_counts(tmp_path, capsys):
    old, old_labels = log_rows(40, seed=2)
    for row in old:
        row["uncertainty"]["fingerprint"] = "old"
        row["time"] = "2025" + row["time"][4:]
    new, new_labels = log_rows(100, base=2.0)
    recalibrate("--labels", kept(tmp_path / "l.sqlite", [*new, *old], [*new_labels, *old_labels]))
    assert "40 left out (scored by another model" in capsys.readouterr().err
    assert Calibration.load("new.json").fingerprint["scorer"] == "f1f1"


def test_earlier_rows_are_fitted_on_and_never_decide_the_promise(tmp_path, capsys):
    rows, labels = log_rows(100, base=2.0)
    store = kept(tmp_path / "l.sqlite", rows, labels)
    earlier = scored_rows(300, seed=9, base=-1.0)
    made = {}
    for name, flip in (("right", False), ("flipped", True)):
        path = write(tmp_path / f"{name}.jsonl", [row | {"correct": row["correct"] ^ flip} for row in earlier])
        recalibrate("--labels", store, "--earlier", path)
        made[name] = Calibration.load("new.json")
    assert "300 earlier rows, for the fit alone" in capsys.readouterr().err
    for one in made.values():
        assert (one.data.rows, one.data.held_out_rows, one.data.fit_rows) == (400, 50, 350)
        assert one.data.accuracy == sum(labels) / 100
        assert one.seen.answer_tokens is not None
    assert made["right"].model != made["flipped"].model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--labels FILE, or a log"),
        (["--labels", "absent.sqlite"], "absent.sqlite: no such file"),
        (["--log", "absent.jsonl"], "absent.jsonl: No such file"),
        (["--labels", "empty.sqlite"], "no answer of an audit has a label"),
        (["--labels", "few.sqlite"], "3 independent"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, message):
    kept(Path("empty.sqlite"), *[rows[:0] for rows in log_rows(1)])
    store = LabelStore(Path("empty.sqlite"))
    store.audited().result()
    store.close()
    kept(Path("few.sqlite"), *[rows[:3] for rows in log_rows(3)])
    assert recalibrate(*arguments) == 1
    assert message in capsys.readouterr().err


def test_a_fit_only_row_of_a_held_out_group_is_not_fitted_on():
    from gnuq_serve.calibration import calibrate

    rows = [
        Row(
            uncertainty=Uncertainty.from_dict(row["uncertainty"]), correct=row["correct"], group=f"g{number % 40}"
        )
        for number, row in enumerate(scored_rows(160))
    ]
    mixed = [dataclasses.replace(row, fit_only=number >= 80) for number, row in enumerate(rows)]
    outcome = calibrate(mixed, max_error=(0.4,), confidence=0.8, resamples=20)
    data = outcome.calibration.data
    assert (data.held_out_rows, data.fit_rows) == (40, 80)  # 20 groups of 2 held out; of the others, both kinds
    assert all(not mixed[one.index].fit_only for one in outcome.held_out)
