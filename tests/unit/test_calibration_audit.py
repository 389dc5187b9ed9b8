import math

import numpy as np
import pytest
from scipy.integrate import quad

from gnuq_serve.calibration.audit import AuditTest


@pytest.mark.parametrize(("answers", "errors"), [(1, 1), (10, 0), (40, 9), (200, 31)])
def test_the_evidence_is_the_mixture_of_likelihood_ratios(answers, errors):
    level = 0.1

    def ratio(angle):  # Jeffreys' prior is uniform in the angle
        q = math.sin(angle) ** 2
        return (q / level) ** errors * ((1 - q) / (1 - level)) ** (answers - errors)

    lowest = math.asin(math.sqrt(level))
    expected = quad(ratio, lowest, math.pi / 2, epsabs=1e-12, limit=400)[0] / (math.pi / 2 - lowest)
    found = math.exp(AuditTest(level, answers=answers, errors=errors).log_evidence)
    assert found == pytest.approx(expected, rel=0.01)


def test_evidence_is_a_fair_bet():
    """At a risk of exactly the level, the expected evidence after one more label is that before."""
    for answers, errors in ((0, 0), (7, 2), (50, 4)):
        now = math.exp(AuditTest(0.1, answers=answers, errors=errors).log_evidence)
        wrong = math.exp(AuditTest(0.1, answers=answers + 1, errors=errors + 1).log_evidence)
        right = math.exp(AuditTest(0.1, answers=answers + 1, errors=errors).log_evidence)
        assert 0.1 * wrong + 0.9 * right == pytest.approx(now, rel=1e-9)


def test_a_broken_promise_is_found_and_stays_found():
    audit = AuditTest(0.1)
    rng = np.random.default_rng(0)
    labels = (rng.random(400) > 0.3).tolist()
    first = next(index for index, correct in enumerate(labels) if audit.add(correct))
    assert first < 200
    for _ in range(3000):
        audit.add(True)
    assert audit.broken
    assert math.exp(audit.log_evidence) < 1
    again = AuditTest(0.1, answers=audit.answers, errors=audit.errors, peak=audit.peak)
    assert again.broken


@pytest.mark.slow
@pytest.mark.parametrize("risk", [0.1, 0.05])
def test_a_kept_promise_is_hardly_ever_reported_although_looked_at_after_every_label(risk):
    rng = np.random.default_rng(5)
    repetitions, reported, missed = 300, 0, 0
    for _ in range(repetitions):
        audit = AuditTest(0.1)
        for index, wrong in enumerate(rng.random(500) < risk):
            audit.add(not wrong)
            if index in (20, 100, 499):
                low, high = audit.risk_interval()
                missed += not low <= risk <= high
        reported += audit.broken
    assert reported / repetitions <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / repetitions)
    assert missed / repetitions <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / repetitions)


def test_the_interval_narrows_around_the_risk():
    assert AuditTest(0.1).risk_interval() == (0.0, 1.0)
    low, high = AuditTest(0.1, answers=2000, errors=160).risk_interval()
    assert 0.05 < low < 0.08 < high < 0.11
    low, high = AuditTest(0.1, answers=200, errors=0).risk_interval()
    assert low == 0.0
    assert high < 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_error": 0.0}, "max_error=0.0 must lie between"),
        ({"max_error": 0.1, "confidence": 1.0}, "confidence=1.0 must lie between"),
        ({"max_error": 0.1, "answers": 2, "errors": 3}, "errors=3 must lie between 0 and answers=2"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        AuditTest(**fields)


@pytest.mark.parametrize("max_error", [0.001, 0.1, 0.5])
def test_many_labels_at_once_are_as_one_after_the_other(max_error):
    rng = np.random.default_rng(4)
    labels = [bool(label) for label in rng.random(2500) > 0.12]
    one_by_one, at_once = AuditTest(max_error), AuditTest(max_error)
    for label in labels:
        one_by_one.add(label)
    at_once.add_all(labels[:7])
    at_once.add_all([])
    assert at_once.add_all(labels[7:]) is one_by_one.broken
    assert (at_once.answers, at_once.errors) == (one_by_one.answers, one_by_one.errors)
    assert at_once.peak == pytest.approx(one_by_one.peak, rel=1e-12)
