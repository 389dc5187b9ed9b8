import numpy as np
import pytest
from scipy.stats import kstest
from sklearn.metrics import brier_score_loss, roc_auc_score

from gnuq_serve.calibration.metrics import Interval, auroc, bootstrap_aurocs, interval, quality, reliability


def data(seed, count=200, values=None):
    rng = np.random.default_rng(seed)
    score = rng.random(count)
    correct = rng.random(count) < score
    return (score if values is None else np.round(score * values) / values), correct


@pytest.mark.parametrize("values", [None, 7, 1])
def test_auroc_is_scikit_learns(values):
    score, correct = data(0, values=values)
    assert auroc(score, correct) == pytest.approx(roc_auc_score(correct, score), abs=1e-12)


def test_auroc_needs_both_classes():
    assert auroc(np.array([0.1, 0.2]), np.array([True, True])) is None
    assert auroc(np.array([]), np.array([], dtype=bool)) is None


def test_the_bootstrap_draws_whole_groups_and_pairs_the_scores():
    score, correct = data(1, 60, values=10)
    groups = np.arange(60) // 3
    other = np.random.default_rng(2).random(60)
    drawn = bootstrap_aurocs([score, other, score], correct, groups, resamples=40, seed=5)
    # Naively: rows repeated, scikit-learn's AUROC.
    rng = np.random.default_rng(5)
    for row in drawn:
        picked = np.concatenate([np.flatnonzero(groups == group) for group in rng.integers(20, size=20)])
        for column, values in enumerate([score, other, score]):
            expected = roc_auc_score(correct[picked], values[picked])
            assert row[column] == pytest.approx(expected, abs=1e-12)


def test_resamples_of_one_class_are_left_out():
    drawn = bootstrap_aurocs(
        [np.array([0.1, 0.9])], np.array([False, True]), np.array([0, 1]), resamples=50, seed=0
    )
    assert np.isnan(drawn).any()
    assert interval(1.0, drawn[:, 0]) == Interval(value=1.0, low=1.0, high=1.0)
    assert interval(None, drawn[:0, 0]) == Interval(value=None, low=None, high=None)


@pytest.mark.slow
def test_intervals_cover():
    """P(score of a right answer > that of a wrong one) for score uniform and P(right) = score is 5/6."""
    covered = 0
    for seed in range(200):
        score, correct = data(seed, 150)
        drawn = bootstrap_aurocs([score], correct, np.arange(150), resamples=200, seed=seed)
        found = interval(auroc(score, correct), drawn[:, 0])
        covered += found.low <= 5 / 6 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_quality_by_hand():
    p = np.array([0.05, 0.15, 0.15, 0.95, 1.0])
    correct = np.array([False, True, False, True, True])
    found = quality(p, correct, np.arange(5), resamples=10, seed=0)
    assert [(part.low, part.high, part.count) for part in found.bins] == [
        (0.0, 0.1, 1),
        (0.1, 0.2, 2),
        (0.9, 1.0, 2),
    ]
    assert found.ece == pytest.approx((1 * 0.05 + 2 * 0.35 + 2 * 0.025) / 5)
    assert found.brier == pytest.approx(brier_score_loss(correct, p))
    assert found.brier_skill == pytest.approx(1 - found.brier / (0.6 * 0.4))
    assert found.accuracy == 0.6
    assert found.auroc.value == pytest.approx(roc_auc_score(correct, p))


def test_skill_has_no_meaning_where_all_are_right():
    found = quality(np.array([0.9, 0.8]), np.array([True, True]), np.arange(2), resamples=10, seed=0)
    assert found.brier_skill is None
    assert found.auroc == Interval(value=None, low=None, high=None)


def test_honest_probabilities_are_reliable():
    score, correct = data(4, 100_000)
    for part in reliability(score, correct):
        assert part.accuracy == pytest.approx(part.mean_p, abs=0.02)
    assert kstest(score, "uniform").pvalue > 1e-3  # the data are what they are said to be
