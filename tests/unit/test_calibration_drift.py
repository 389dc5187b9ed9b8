import numpy as np
import pytest
from scipy.stats import ks_2samp, kstwobign

from gnuq_serve.calibration.drift import DriftMonitor, two_sample_ks


@pytest.mark.parametrize(("first", "second", "shift"), [(200, 300, 0.0), (60, 200, 0.2), (1000, 50, 0.5)])
def test_the_statistic_is_scipys_and_the_p_value_near_its_exact_one(first, second, shift):
    rng = np.random.default_rng(first)
    a, b = rng.normal(size=first), rng.normal(shift, 1, size=second)
    statistic, p_value = two_sample_ks(a, b)
    exact = ks_2samp(a, b, method="exact")
    assert statistic == pytest.approx(exact.statistic, abs=1e-12)
    assert p_value == pytest.approx(exact.pvalue, rel=0.15)
    root = np.sqrt(first * second / (first + second))
    assert p_value == pytest.approx(kstwobign.sf((root + 0.12 + 0.11 / root) * statistic), rel=1e-9)


def test_equal_samples_and_ties():
    statistic, p_value = two_sample_ks(np.array([0.5, 0.5, 0.7]), np.array([0.5, 0.7, 0.5]))
    assert (statistic, p_value) == (0.0, 1.0)
    assert two_sample_ks(np.zeros(400), np.ones(400))[0] == 1.0
    assert 0.0 <= two_sample_ks(np.zeros(400), np.ones(400))[1] < 1e-100


def test_it_compares_every_half_window_and_says_the_sizes():
    rng = np.random.default_rng(0)
    monitor = DriftMonitor(rng.random(500).tolist(), window=100)
    compared = [index for index in range(1, 401) if monitor.add(float(rng.random())) is not None]
    assert compared == [100, 150, 200, 250, 300, 350, 400]
    assert not monitor.latest.drifted
    assert "the last 100 scores agree with the 500 of the calibration" in monitor.latest.sentence


def test_a_shift_is_found_once_the_window_holds_it_and_stays_known():
    rng = np.random.default_rng(1)
    monitor = DriftMonitor(rng.beta(5, 2, 500).tolist(), window=100)
    for _ in range(200):
        monitor.add(float(rng.beta(5, 2)))
    assert not monitor.latest.drifted
    for _ in range(100):
        monitor.add(float(rng.beta(2, 3)))
    assert monitor.latest.drifted
    assert "calibrate again" in monitor.latest.sentence
    for _ in range(200):
        monitor.add(float(rng.beta(5, 2)))
    assert monitor.latest.p_value > 0.001
    assert monitor.latest.drifted


@pytest.mark.slow
def test_false_alarms_are_as_rare_as_stated():
    """One comparison at level .01: alarms in about 1 % of them."""
    rng = np.random.default_rng(2)
    alarms = comparisons = 0
    for _ in range(60):
        monitor = DriftMonitor(rng.random(1000).tolist(), window=100, alpha=0.01)
        for score in rng.random(2000):
            if monitor.add(float(score)) is not None:
                comparisons += 1
                alarms += monitor.latest.p_value < 0.01
    assert comparisons == 60 * 39
    assert alarms / comparisons < 0.01 + 3 * np.sqrt(2 * 0.01 / comparisons)  # windows overlap by half


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reference": []}, "reference is empty"),
        ({"reference": [0.5], "window": 5}, "window=5 must be at least 20"),
        ({"reference": [0.5], "alpha": 0}, "alpha=0 must lie between 0 and 1"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        DriftMonitor(fields.pop("reference"), **fields)
    with pytest.raises(ValueError, match="must be a finite number"):
        DriftMonitor([0.5]).add(float("nan"))
