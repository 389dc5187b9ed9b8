"""AUROC, AUPR, PRR, AURC and risk at coverage: against scikit-learn, naive loops and an example by hand."""

import itertools
import math

import numpy as np
import pytest

from gnuq_serve.evaluation.metrics import METRICS, Ordered, all_metrics, draws, risk_coverage, with_intervals

sklearn_metrics = pytest.importorskip("sklearn.metrics")


def metrics(uncertainty, correct):
    uncertainty, correct = np.asarray(uncertainty, float), np.asarray(correct, bool)
    values = all_metrics(Ordered.of(uncertainty, correct), np.ones((1, correct.size)))
    assert set(values) == set(METRICS)
    return {name: value.item() for name, value in values.items()}


def sample(seed, count=80, levels=None):
    rng = np.random.default_rng(seed)
    correct = rng.random(count) < 0.4
    uncertainty = rng.normal(size=count) - 0.8 * correct
    return (uncertainty if levels is None else np.round(uncertainty * levels) / levels), correct


def accuracy_curve(correct_in_order):
    return [sum(correct_in_order[:k]) / k for k in range(1, len(correct_in_order) + 1)]


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("seed", range(5))
def test_scikit_learns_auroc_and_average_precision(seed, levels):
    uncertainty, correct = sample(seed, levels=levels)
    found = metrics(uncertainty, correct)
    assert found["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(~correct, uncertainty), abs=1e-12)
    assert found["aupr"] == pytest.approx(
        sklearn_metrics.average_precision_score(~correct, uncertainty), abs=1e-12
    )


def test_an_example_by_hand():
    # From the most certain answer on: right, wrong, right, wrong. Shares of right ones among the first k:
    # 1, 1/2, 2/3, 1/2, mean 2/3. Best order: 1, 1, 2/3, 1/2, mean 19/24. Chance: 1/2.
    found = metrics([0.1, 0.2, 0.3, 0.4], [True, False, True, False])
    assert found["prr"] == pytest.approx((2 / 3 - 1 / 2) / (19 / 24 - 1 / 2))  # 4/7
    assert found["aurc"] == pytest.approx(1 / 3)
    assert found["auroc"] == pytest.approx(3 / 4)
    assert found["aupr"] == pytest.approx((1 / 2) * 1 + (1 / 2) * (2 / 3))
    assert found["risk_at_0.2"] == 0  # one answer kept
    assert found["risk_at_0.5"] == pytest.approx(1 / 2)
    assert found["risk_at_0.8"] == pytest.approx(1 / 2)


@pytest.mark.parametrize("seed", range(3))
def test_prr_is_lm_polygraphs(seed):
    """Its definition spelled out: rejecting from the least certain on, against the oracle and random orders."""

    def area(estimator, target):
        kept = np.asarray(target)[np.argsort(estimator)]
        scores = (np.cumsum(kept) / np.arange(1, len(kept) + 1))[::-1]
        return scores.sum() / len(kept)

    uncertainty, correct = sample(seed)
    target = correct.astype(float)
    rng = np.random.default_rng(0)
    chance = np.mean([area(rng.permutation(correct.size), target) for _ in range(4000)])
    expected = (area(uncertainty, target) - chance) / (area(-target, target) - chance)
    assert metrics(uncertainty, correct)["prr"] == pytest.approx(expected, abs=0.02)


def test_ties_count_as_the_mean_over_their_orders():
    uncertainty = [0, 1, 1, 1, 2, 2]
    correct = [True, True, False, False, True, False]
    areas, risks = [], []
    for middle in itertools.permutations(correct[1:4]):
        for last in itertools.permutations(correct[4:]):
            order = [correct[0], *middle, *last]
            areas.append(np.mean(accuracy_curve(order)))
            risks.append(1 - accuracy_curve(order)[2])
    found = metrics(uncertainty, correct)
    assert found["aurc"] == pytest.approx(1 - np.mean(areas))
    assert found["risk_at_0.5"] == pytest.approx(np.mean(risks))


@pytest.mark.parametrize("levels", [None, 3])
def test_weights_count_like_repeated_answers(levels):
    uncertainty, correct = sample(7, count=30, levels=levels)
    weights = draws(30, 5, seed=1)
    assert weights.sum(1).tolist() == [30.0] * 5
    found = all_metrics(Ordered.of(uncertainty, correct), weights)
    for row, weight in enumerate(weights.astype(int)):
        repeated = metrics(np.repeat(uncertainty, weight), np.repeat(correct, weight))
        for name in METRICS:
            assert found[name][row] == pytest.approx(repeated[name], abs=1e-12), name


def test_perfect_chance_and_reversed():
    correct = np.array([True] * 5 + [False] * 5)
    perfect = metrics(np.arange(10), correct)
    assert (perfect["auroc"], perfect["prr"], perfect["aupr"]) == (1, pytest.approx(1), pytest.approx(1))
    assert metrics(np.zeros(10), correct)["auroc"] == 0.5
    assert metrics(np.zeros(10), correct)["prr"] == pytest.approx(0, abs=1e-12)
    assert metrics(-np.arange(10), correct)["auroc"] == 0


def test_the_curve_ends_at_the_error_rate():
    uncertainty, correct = sample(3)
    coverage, risk = risk_coverage(uncertainty, correct)
    assert coverage[-1] == 1
    assert risk[-1] == pytest.approx(1 - correct.mean())
    assert risk.mean() == pytest.approx(metrics(uncertainty, correct)["aurc"])


def test_intervals_hold_the_value_and_missing_answers_are_left_out():
    uncertainty, correct = sample(11, count=200)
    weights = draws(200, 300, seed=0)
    found, resampled = with_intervals(uncertainty, correct, weights)
    assert resampled.shape == (300,)
    for name in METRICS:
        assert found[name].low <= found[name].value <= found[name].high
    # The standard error of Hanley and McNeil (1982).
    area, rights, wrongs = found["auroc"].value, correct.sum(), (~correct).sum()
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (rights - 1) * (one - area**2) + (wrongs - 1) * (two - area**2)
    width = 2 * 1.96 * math.sqrt(variance / (rights * wrongs))
    assert found["auroc"].high - found["auroc"].low == pytest.approx(width, rel=0.2)

    holes = uncertainty.copy()
    holes[::4] = np.nan
    there = np.isfinite(holes)
    left, _ = with_intervals(holes, correct, weights)
    assert left["auroc"].value == pytest.approx(metrics(holes[there], correct[there])["auroc"])


def test_one_class_alone_has_no_metrics():
    found, resampled = with_intervals(np.arange(4.0), np.ones(4, bool), draws(4, 10, seed=0))
    assert all(value.value is None for value in found.values())
    assert np.isnan(resampled).all()
    nothing, _ = with_intervals(np.full(4, np.nan), np.array([True, False] * 2), draws(4, 10, seed=0))
    assert nothing["auroc"].value is None
