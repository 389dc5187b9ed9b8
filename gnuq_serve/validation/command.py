"""``gnuq-serve validate synthetic | covariance``: runs, then a table, a JSON file and a figure."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gnuq_serve.calibration.arguments import EXIT_STOPPED
from gnuq_serve.calibration.command import check_packages
from gnuq_serve.calibration.progress import progress_bar, say
from gnuq_serve.calibration.stopping import terminating_as_interrupt

PACKAGES = ("numpyro", "jax", "curvlinops", "torch", "scipy", "matplotlib", "tqdm")
DEFAULTS: dict[str, Any] = {"widths": [2, 4, 8, 16, 32, 64], "seeds": 3, "train": 100, "draws": 300}
QUICK: dict[str, Any] = {"problems": ["waves", "three_classes"], "widths": [2, 4, 8], "seeds": 2, "draws": 200}


def run(args: argparse.Namespace) -> int:
    """Run one experiment; returns the exit code.

    Raises:
        ImportError: the extra is missing.
        ValueError: an argument can't be used, or ``--out`` holds runs under other settings.
    """
    check_packages(PACKAGES, "validate")
    covariance = args.experiment == "covariance"
    if covariance and bool(args.model) != bool(args.evaluation):
        raise ValueError("--model and --evaluation go together: a model, and an evaluation of its answers")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        with terminating_as_interrupt():
            rows, settings = _rows(args, out)
            language_model = _language_model(args, out) if covariance and args.model else None
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return EXIT_STOPPED
    from gnuq_serve.validation.agreement import Bounds
    from gnuq_serve.validation.figures import covariance_figure, synthetic_figure
    from gnuq_serve.validation.report import covariance_report, synthetic_report
    from gnuq_serve.validation.table import table

    report = (covariance_report if covariance else synthetic_report)(rows, Bounds(args.max_rhat, args.min_ess))
    seconds = round(time.monotonic() - started, 1)
    report = {"experiment": args.experiment, "settings": settings, "seconds_of_this_call": seconds} | report
    if language_model:
        report["language_model"] = language_model
    path = out / f"{args.experiment}.json"
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print("\n".join(table(report)))
    say(f"wrote {path}")
    if report["runs"]:
        figure = out / f"{args.experiment}.png"
        figure.write_bytes((covariance_figure if covariance else synthetic_figure)(report))
        say(f"wrote {figure}")
    return 0


def _rows(args: argparse.Namespace, out: Path) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    from gnuq_serve.validation.problems import PROBLEMS
    from gnuq_serve.validation.runs import RunsFile, run_all
    from gnuq_serve.validation.study import Case, Settings

    chosen = {"problems": list(PROBLEMS)} | DEFAULTS | (QUICK if args.quick else {})
    chosen |= {name: value for name in chosen if (value := getattr(args, name)) is not None}
    if unknown := [name for name in chosen["problems"] if name not in PROBLEMS]:
        raise ValueError(f"--problems {unknown[0]}: there is none of that name; they are {', '.join(PROBLEMS)}")
    settings = Settings(train=chosen["train"], draws=chosen["draws"], prior=args.prior)
    # Small networks first: soon there is something to see of every problem.
    cases = [
        Case(problem, width, seed)
        for width in sorted(chosen["widths"])
        for problem in chosen["problems"]
        for seed in range(chosen["seeds"])
    ]
    with RunsFile(out / "runs.jsonl", settings) as file:
        bar = progress_bar("runs", sum(case in file.rows for case in cases), len(cases))
        rows = run_all(cases, settings, file, jobs=args.jobs, progress=bar)
    return rows, asdict(settings) | {name: chosen[name] for name in ("problems", "widths", "seeds")}


def _language_model(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    from gnuq_serve.validation.answers_study import answers_report

    return answers_report(args.model, args.evaluation, out, limit=args.limit, texts=args.texts)
