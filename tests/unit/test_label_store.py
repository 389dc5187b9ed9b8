import json

import pytest

from gnuq_serve.calibration.audit import AuditTest
from gnuq_serve.service.operator.audit_watch import audit_reports
from gnuq_serve.service.operator.label_store import LabelledAnswer, LabelStore, LabelStoreError, read_labels


def answer(number, **changes):
    made = {"audit": True, "decision": "answer", "calibration": "faq@1", "max_error": 0.1, "row": {"n": number}}
    return LabelledAnswer(id=f"unc-{number}", **(made | changes))


@pytest.fixture
def store(tmp_path):
    made = LabelStore(tmp_path / "labels.sqlite")
    yield made
    made.close()


def test_marked_answers_wait_for_their_labels(store):
    store.mark(answer(1))
    store.mark(answer(2))
    assert store.label("unc-2", correct=False).result() is True
    assert store.label("unc-9", correct=False).result() is None
    assert [(one.id, one.correct) for one in store.audited().result()] == [("unc-1", None), ("unc-2", False)]
    (labelled,) = read_labels(store.path)
    assert labelled == answer(2, correct=False)
    assert store.path.stat().st_mode & 0o777 == 0o600


def test_volunteered_labels_are_kept_apart(store):
    store.volunteer(answer(1, audit=False, correct=True)).result()
    store.mark(answer(2))
    assert [one.id for one in store.audited().result()] == ["unc-2"]
    assert store.label("unc-1", correct=False).result() is False  # a correction; not drawn at random
    # What somebody volunteers on an answer that was drawn is not its label: complaints would be counted alone.
    assert store.label("unc-2", correct=False, volunteered=True).result() is True
    assert store.audited().result()[0].correct is None
    store.label("unc-2", correct=True).result()
    store.label("unc-2", correct=False, volunteered=True).result()
    store.volunteer(answer(2, audit=False, correct=False)).result()
    assert [(one.audit, one.correct) for one in read_labels(store.path)] == [(False, False), (True, True)]


def test_two_processes_share_the_file(store):
    other = LabelStore(store.path)
    store.mark(answer(1))
    store.audited().result()
    assert other.label("unc-1", correct=True).result() is True
    assert store.audited().result()[0].correct is True
    other.close()


def test_a_path_that_cannot_be_written_is_told_once(tmp_path, caplog):
    store = LabelStore(tmp_path / "absent" / "labels.sqlite")
    store.mark(answer(1))
    store.mark(answer(2))
    store.close()
    assert caplog.text.count("audits are incomplete") == 1
    store.mark(answer(3))  # closed: nothing to say


def test_files_that_hold_no_labels(tmp_path):
    with pytest.raises(LabelStoreError, match="no such file"):
        read_labels(tmp_path / "absent.sqlite")
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"a": 1}) * 100)
    with pytest.raises(LabelStoreError, match="not a file of labels"):
        read_labels(path)


def test_the_promise_is_tested_with_what_it_covers_only():
    labels = [True] * 18 + [False] * 12
    answers = [answer(i, correct=label) for i, label in enumerate(labels)]
    others = [
        answer(100, decision="abstain", correct=False),
        answer(101, audit=False, correct=False),
        answer(102, max_error=None, correct=False),
        answer(103),
    ]
    (report,) = audit_reports(answers + others, {"faq@1": 0.9}.get)
    oracle = AuditTest(0.1, 0.9)
    for label in labels:
        oracle.add(label)
    assert (report.right, report.wrong, report.waiting) == (18, 12, 1)
    assert report.broken is oracle.broken is True
    assert report.risk == oracle.risk_interval()
    assert report.risk[0] > 0.1
    assert report.confidence == 0.9


def test_each_promise_is_tested_by_itself():
    answers = [answer(1, correct=True), answer(2, max_error=0.2, correct=True), answer(3, calibration="b@2")]
    reports = audit_reports(answers, lambda _: None)
    assert [(one.calibration, one.max_error, one.right, one.waiting) for one in reports] == [
        ("faq@1", 0.1, 1, 0),
        ("faq@1", 0.2, 1, 0),
        ("b@2", 0.1, 0, 1),
    ]
    assert not any(one.broken for one in reports)
    assert {one.confidence for one in reports} == {0.95}
