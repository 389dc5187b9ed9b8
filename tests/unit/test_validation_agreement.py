"""What runs say together: correlations, refusals, intervals, reports, figures."""

import numpy as np
import pytest
from scipy.stats import rankdata

pytest.importorskip("numpyro")

from gnuq_serve.validation.agreement import Bounds, compare, slope, summarise
from gnuq_serve.validation.figures import covariance_figure, synthetic_figure
from gnuq_serve.validation.report import COVARIANCE, covariance_report, synthetic_report

RNG = np.random.default_rng(0)


def made_row(width, seed, *, noise=0.0, **other):
    """Isotropic follows the reference but for noise, every other covariance is its inverse."""
    rng = np.random.default_rng([width, seed])
    variance = rng.uniform(0.01, 0.2, 40)
    names = [left for left, _ in COVARIANCE.values() if left != "isotropic"]
    inputs = {name: list(1 / variance) for name in names}
    inputs |= {
        "p": list(rng.uniform(0.5, 1.0, 40)),
        "variance": list(variance),
        "half_0": list(variance),
        "half_1": list(variance),
        "bernoulli": list(rng.uniform(0, 0.25, 40)),
        "isotropic": list(7 * variance * np.exp(noise * rng.standard_normal(40))),
    }
    row = {"problem": "waves", "width": width, "seed": seed, "parameters": 10 * width, "rhat": 1.01, "ess": 500.0}
    return row | {"inputs": inputs} | other


def test_compare_by_hand():
    a, b = RNG.random(20), RNG.random(20)
    found = compare(a, b)
    assert found["pearson"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
    assert compare(a, 3 * a)["log_spread"] == pytest.approx(0, abs=1e-12)
    assert compare(a, a**2)["log_spread"] == pytest.approx(np.log(a).std())
    assert compare(np.ones(20), b) == {"spearman": None, "pearson": None, "log_spread": np.log(b).std()}
    assert compare(a - 1, b)["log_spread"] is None


def test_runs_that_did_not_converge_are_refused_and_listed():
    rows = [made_row(2, 0), made_row(2, 1, rhat=1.2), made_row(4, 0, ess=40.0)]
    rows.append(
        {"problem": "waves", "width": 4, "seed": 1, "parameters": 40, "failed": "training did not converge"}
    )
    rows.append(made_row(4, 2))
    rows[-1]["inputs"]["p"] = [0.7] * 40
    report = synthetic_report(rows, Bounds())
    assert [(run["width"], run["seed"]) for run in report["runs"]] == [(2, 0)]
    assert [run["reason"] for run in report["refused"]] == [
        "R-hat of a prediction is 1.200, above 1.05",
        "effective sample size of a prediction is 40, under 100",
        "training did not converge",
        "the trained network gives every input the same p",
    ]
    assert len(synthetic_report(rows, Bounds(max_rhat=1.3))["runs"]) == 2


def test_the_report_says_what_the_columns_say():
    rows = [made_row(width, seed, noise=0.5 if width == 2 else 0.05) for width in (2, 20) for seed in range(4)]
    report = synthetic_report(rows, Bounds())
    small, large = (table["agreement"]["epistemic"]["all"]["spearman"] for table in report["by_size"])
    assert small["runs"] == large["runs"] == 4
    assert small["low"] <= small["mean"] <= small["high"] < large["low"]
    growth = report["slopes"]["epistemic"]["all"]["spearman"]
    assert growth["per_decade"] == pytest.approx(large["mean"] - small["mean"])
    assert growth["low"] > 0
    covariance = covariance_report(rows, Bounds())
    assert covariance["overall"]["full:train"]["all"]["spearman"]["mean"] == pytest.approx(-1)
    worse = covariance["against_isotropic"]["full:train"]["near"]["spearman"]
    assert worse["high"] < -1.5
    for png in (synthetic_figure(report), covariance_figure(covariance)):
        assert png.startswith(b"\x89PNG")


def test_intervals_and_slopes():
    values = list(RNG.normal(0.3, 0.1, 400))
    found = summarise(values)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * np.std(values) / 20, rel=0.15)
    assert summarise([]) == {"mean": None, "low": None, "high": None, "runs": 0}
    # Another level is another problem's, not a change with size.
    exact = slope([10, 100, 1000, 10, 100, 1000], [0.1, 0.3, 0.5, -0.9, -0.7, -0.5], [*"aaabbb"])
    assert exact["per_decade"] == pytest.approx(0.2)
    assert (exact["low"], exact["high"]) == pytest.approx((0.2, 0.2))
    uneven = slope([10, 100, 100, 1000], [0.0, 0.0, 1.0, 1.0], [*"aabb"])
    assert uneven["per_decade"] == pytest.approx(0.0)
    assert slope([10, 10], [0.1, 0.2], [*"aa"])["per_decade"] is None
