"""The report: whole, self-contained, escaped, and with the errors that a plain sort finds."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from scored_rows import scored_rows

from gnuq_serve import Uncertainty
from gnuq_serve.calibration import Row
from gnuq_serve.calibration.judging import JudgeQuality, judge_quality
from gnuq_serve.calibration.labelling import Labelled
from gnuq_serve.calibration.questions import Question
from gnuq_serve.calibration.report import confident_errors, write_report
from gnuq_serve.matching import Reference

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from gnuq_serve.calibration import calibrate

EVIL = '<script>alert("x")</script> & {{ 7 * 7 }}'


def labelled_rows(tmp_path, rows):
    labelled = Labelled()
    for index, row in enumerate(rows):
        labelled.rows.append(
            Row(uncertainty=Uncertainty.from_dict(row["uncertainty"]), correct=row["correct"], key=str(index + 1))
        )
        reference = Reference(answers=(f"Reference {index}", EVIL), question=f"Question {index}? {EVIL}")
        labelled.questions.append(
            Question(key=str(index), path=tmp_path / "qa.jsonl", line=index + 1, reference=reference)
        )
        labelled.texts.append(f"Answer {index} {EVIL}")
    labelled.leave_out("skipped: <the queue is full>")
    return labelled


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("report")
    labelled = labelled_rows(tmp_path, scored_rows(300, base=1.5))
    outcome = calibrate(labelled.rows, max_error=(0.3, 0.001), resamples=50)
    judge = JudgeQuality(right=30, right_rejected=2, wrong=20, wrong_accepted=5).sentence()
    page = write_report(tmp_path / "out", outcome, labelled, judge=judge)
    return outcome, labelled, page


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in {"meta", "img"}:
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in {"src", "href", "srcset", "data"}]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_well_formed_and_needs_nothing_else(case):
    page = Page(case[2].read_text(encoding="utf-8"))
    assert page.open == []
    assert "script" not in page.tags
    assert len(page.links) == 3
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "url(" not in case[2].read_text(encoding="utf-8")


def test_figures_are_in_the_page_and_beside_it(case):
    from PIL import Image

    links = Page(case[2].read_text(encoding="utf-8")).links
    inside = {base64.b64decode(link.partition(",")[2]) for link in links}
    beside = {path.name: path.read_bytes() for path in case[2].parent.glob("*.png")}
    assert set(beside) == {"risk_coverage.png", "reliability.png", "scores.png"}
    assert inside == set(beside.values())
    for png in inside:
        with Image.open(io.BytesIO(png)) as image:
            assert image.width > 900
            assert image.convert("L").getextrema()[0] < 100  # something is drawn


def test_text_of_users_is_shown_and_never_run(case):
    raw = case[2].read_text(encoding="utf-8")
    assert "<script" not in raw
    assert "&lt;script&gt;alert" in raw
    assert "{{ 7 * 7 }}" in raw
    assert "1 left out (skipped: &lt;the queue is full&gt;)" in raw


def test_the_most_confident_errors_are_those_of_a_plain_sort(case):
    outcome, labelled, _ = case
    wrong = [(held.p_correct, held.index) for held in outcome.held_out if not labelled.rows[held.index].correct]
    wanted = [index for _, index in sorted(wrong, reverse=True)[:20]]
    assert len(wrong) > 20
    errors = confident_errors(outcome, labelled)
    assert [error.line - 1 for error in errors] == wanted
    for error, index in zip(errors, wanted, strict=True):
        assert error.question.startswith(f"Question {index}?")
        assert error.answer.startswith(f"Answer {index} ")
        assert error.references[0] == f"Reference {index}"


def test_everything_that_was_found_is_said(case):
    outcome, _, path = case
    text = " ".join(" ".join(Page(path.read_text(encoding="utf-8")).text).split())
    for promise in outcome.guarantee.promises:
        assert promise.sentence in text
    assert outcome.verdict.sentence in text
    for point in outcome.guarantee.band:
        assert f"{point.threshold:.4f} {point.answered} (" in text
    for signal in outcome.signals:
        assert signal.name in text
    for word in ("What it covers", "What it does not cover", "Asking again until an answer is confident"):
        assert word in text
    assert "called right 5 of 20 (25.0%; 95% interval 8.7% to 49.1%)" in text  # as published tables have it


def test_long_texts_are_cut(tmp_path):
    labelled = labelled_rows(tmp_path, scored_rows(60, base=-1.0))
    labelled.texts = ["x" * 5000] * 60
    outcome = calibrate(labelled.rows, resamples=20)
    assert {len(error.answer) for error in confident_errors(outcome, labelled)} == {600}


@pytest.mark.parametrize("correct", [True, False])
def test_one_kind_of_answer_only(tmp_path, correct):
    labelled = labelled_rows(tmp_path, [{**row, "correct": correct} for row in scored_rows(40)])
    outcome = calibrate(labelled.rows, resamples=20)
    raw = write_report(tmp_path, outcome, labelled).read_text(encoding="utf-8")
    assert Page(raw).open == []
    assert not re.search(r"\b(None|nan|inf)\b", " ".join(Page(raw).text))
    assert ("No held-out answer is wrong" in raw) is correct


def test_a_judge_is_counted_by_both_kinds_of_error():
    pairs = [(True, True)] * 5 + [(False, True)] * 2 + [(True, False)] * 3 + [(False, False)] * 4
    quality = judge_quality(pairs)
    assert (quality.right, quality.right_rejected, quality.wrong, quality.wrong_accepted) == (7, 2, 7, 3)
    assert "none of the wrong" in judge_quality([(True, True)]).sentence()
