"""The report of a calibration: one HTML file that needs nothing else, and its figures as PNG beside it.

**The twenty most confident errors show questions and answers**: the only place where their text goes, apart from
the working file. The calibration itself holds none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gnuq_serve.calibration.figures import figures
from gnuq_serve.calibration.page import data_url, render

if TYPE_CHECKING:
    from gnuq_serve.calibration import Outcome
    from gnuq_serve.calibration.labelling import Labelled

SHOWN_ERRORS = 20
_LONGEST_TEXT = 600


@dataclass(frozen=True, slots=True)
class ConfidentError:
    """One wrong answer for the eyes of whoever reads the report."""

    p_correct: float
    line: int
    question: str
    answer: str
    references: tuple[str, ...]


def write_report(folder: str | Path, outcome: Outcome, labelled: Labelled, *, judge: str | None = None) -> Path:
    """Write ``report.html`` and its figures; returns the path of the page.

    Args:
        folder: made if it is not there.
        outcome: what `calibrate` found on ``labelled.rows``.
        labelled: those rows, with questions and answers.
        judge: what is known of the judge's own error, where a judge said what is right.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    drawn = figures(outcome)
    page = render(
        "gnuq_serve.calibration",
        "report.html",
        outcome=outcome,
        calibration=outcome.calibration,
        guarantee=outcome.guarantee,
        quality=outcome.quality,
        labelled=labelled,
        judge=judge,
        errors=confident_errors(outcome, labelled),
        figures={name.removesuffix(".png"): data_url(png) for name, png in drawn.items()},
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in drawn.items():
        (folder / name).write_bytes(png)
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def confident_errors(outcome: Outcome, labelled: Labelled) -> list[ConfidentError]:
    """The held-out wrong answers with the highest ``p_correct``, most confident first, at most twenty."""
    wrong = sorted((held for held in outcome.held_out if not held.correct), key=lambda held: -held.p_correct)
    return [
        ConfidentError(
            p_correct=held.p_correct,
            line=labelled.questions[held.index].line,
            question=_short(labelled.questions[held.index].text),
            answer=_short(labelled.texts[held.index] or ""),
            references=tuple(_short(text) for text in labelled.questions[held.index].reference.answers[:3]),
        )
        for held in wrong[:SHOWN_ERRORS]
    ]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"
