"""The benchmark's own statistics: whole groups, a planted difference found, and none where there is none."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from scored_rows import scored_rows

pytest.importorskip("sklearn")
ROOT = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("calibration_benchmark", ROOT / "calibration.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_splits_keep_groups_whole_and_lose_nothing(script, tmp_path):
    rows = [{**row, "group": row.pop("conversation")} for row in scored_rows(120, groups=37)]
    rows = script.read_rows(write(tmp_path / "r.jsonl", rows))
    for seed in range(5):
        inside, outside = script.split(rows, 60, seed)
        assert sorted(inside + outside) == list(range(120))
        assert not {rows[at].group for at in inside} & {rows[at].group for at in outside}
        assert 60 <= len(inside) < 64  # groups of three or four


def test_rows_that_are_unlabelled_or_unscored_are_left_out(script, tmp_path):
    rows = scored_rows(5)
    rows[1]["correct"] = None
    rows[2]["uncertainty"] = {"status": "failed", "reason": "x"}
    assert len(script.read_rows(write(tmp_path / "r.jsonl", rows))) == 3


def outcomes(better, splits=4, count=300):
    """Scores of one signal and of a second that is the same but for noise on top."""
    rng = np.random.default_rng(0)
    right = rng.random(count) < 0.5
    clear = right + rng.normal(0, 0.7, count)
    noisy = clear + rng.normal(0, 1.5, count)
    parts = [np.sort(rng.choice(count, count // 2, replace=False)) for _ in range(splits)]
    return [
        {
            "outside": part,
            "p_correct": (clear if better else noisy)[part],
            "free_scores": noisy[part],
            "right": right[part],
            "auroc": 0.5,
            "auroc_free": 0.5,
        }
        for part in parts
    ]


def test_the_paired_interval(script):
    value, low, high = script.paired_interval(outcomes(better=True), 300)
    naive = []
    for one in outcomes(better=True):
        sides = []
        for scores in (one["p_correct"], one["free_scores"]):
            pairs = [(a > b) for a in scores[one["right"]] for b in scores[~one["right"]]]
            sides.append(np.mean(pairs))
        naive.append(sides[0] - sides[1])
    assert value == pytest.approx(np.mean(naive), abs=1e-12)
    assert 0 < low < value < high
    assert script.paired_interval(outcomes(better=False), 300) == (0.0, 0.0, 0.0)


def test_what_a_threshold_does_on_the_test_part(script):
    scores, right = np.array([0.9, 0.8, np.nan, 0.1]), np.array([True, False, True, False])
    taken = script.answered(scores, right, 0.5, 0.5)
    assert taken == {"made": True, "coverage": 0.5, "held": True, "broken": False, "error": 0.5}
    assert script.answered(scores, right, None, 0.5)["made"] is False
    assert script.answered(scores, right, 0.95, 0.5)["held"] is None
    many = np.ones(200)
    errors = np.array([False] * 50 + [True] * 150)  # 25 % errors: beyond chance for 10 %, not for 24 %
    assert script.answered(many, errors, 0.5, 0.10)["broken"] is True
    assert script.answered(many, errors, 0.5, 0.24)["broken"] is False
    assert script.answered(many, errors, 0.5, 0.24)["held"] is False


def test_a_set_is_measured_and_printed(script, tmp_path, capsys):
    rows = scored_rows(240, base=1.0)
    random.Random(0).shuffle(rows)
    result = script.measure(write(tmp_path / "made_up.rows.jsonl", rows), 2, (0.3,), 0.9)
    assert (result["set"], result["rows"], result["calibrated_on"]) == ("made_up", 240, 190)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    # One signal tells everything here: nothing is to be gained over it, and hardly anything lost.
    assert abs(result["auroc_difference"]["value"]) < 0.05
    script.print_tables([result], 0.9)
    assert "made_up" in capsys.readouterr().out
