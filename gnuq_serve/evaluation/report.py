"""``report.html``: one file that needs nothing else; it holds no text of questions or answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gnuq_serve.calibration.page import data_url, render
from gnuq_serve.evaluation.figures import figures
from gnuq_serve.evaluation.metrics import COVERAGES
from gnuq_serve.evaluation.results import SetResult


def write_report(folder: Path, sets: Sequence[SetResult], results: Mapping[str, Any]) -> Path:
    """Write the page; returns its path.

    Args:
        folder: where it goes.
        sets: what was found.
        results: the same as JSON, with how it came about.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    page = render(
        "gnuq_serve.evaluation",
        "report.html",
        sets=sets,
        results=results,
        coverages=COVERAGES,
        drawn={one.name: {name: data_url(png) for name, png in figures(one).items()} for one in sets},
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
