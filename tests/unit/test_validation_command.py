"""The command from end to end on the smallest network: runs, results, figures, going on where it stopped."""

import json
import subprocess
import sys
import time

import psutil
import pytest

pytest.importorskip("numpyro")

from gnuq_serve.cli import main
from gnuq_serve.validation import study
from gnuq_serve.validation.study import Case, Settings

SMALL = ["--problems", "linear", "--widths", "1", "--seeds", "1", "--train", "20", "--draws", "40", "--jobs", "1"]


@pytest.mark.slow
def test_both_experiments_from_the_same_runs(tmp_path, capsys):
    out = ["--out", str(tmp_path), *SMALL, "--max-rhat", "2", "--min-ess", "1"]
    assert main(["validate", "synthetic", *out]) == 0
    assert "1 runs, 0 refused" in capsys.readouterr().out
    report = json.loads((tmp_path / "synthetic.json").read_text())
    (run,) = report["runs"]
    assert run["parameters"] == 1 * 2 + 1 + 1 + 1 + 2 + 2
    written = (tmp_path / "runs.jsonl").read_text()

    assert main(["validate", "covariance", *out]) == 0
    assert (tmp_path / "runs.jsonl").read_text() == written  # nothing was run again
    covariance = json.loads((tmp_path / "covariance.json").read_text())
    assert (
        covariance["overall"]["isotropic"]["all"]["spearman"]["mean"]
        == run["agreement"]["epistemic"]["all"]["spearman"]
    )
    for name in ("synthetic.png", "covariance.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    assert main(["validate", "synthetic", *out, "--max-rhat", "0.5"]) == 0
    assert "1 refused" in capsys.readouterr().out
    assert main(["validate", "synthetic", *out, "--prior", "fan_in"]) == 1
    assert "prior was 'unit', is 'fan_in'" in capsys.readouterr().err


@pytest.mark.slow
def test_told_to_end_it_leaves_no_run_behind(tmp_path):
    command = [sys.executable, "-m", "gnuq_serve.cli", "validate", "synthetic", "--out", str(tmp_path), "--quick"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    runs: list[psutil.Process] = []
    while len(runs) < 2:
        assert process.poll() is None
        time.sleep(0.1)
        children = psutil.Process(process.pid).children()
        runs = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, "goes on from here" in said) == (130, True), said
    assert not psutil.wait_procs(runs, timeout=10)[1]


def test_training_that_fails_is_a_row(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("training did not converge: gradient 1.0e+00 after 3 steps")

    monkeypatch.setattr(study, "train", fail)
    row = study.run_case(Case("linear", 1, 0), Settings())
    assert row == {
        "problem": "linear",
        "width": 1,
        "seed": 0,
        "parameters": 9,
        "failed": "training did not converge: gradient 1.0e+00 after 3 steps",
    }


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["synthetic", "--problems", "moons"], "--problems moons: there is none of that name"),
        (["covariance", "--model", "somewhere"], "--model and --evaluation go together"),
    ],
)
def test_complaints(tmp_path, capsys, arguments, complaint):
    assert main(["validate", *arguments, "--out", str(tmp_path)]) == 1
    assert complaint in capsys.readouterr().err
