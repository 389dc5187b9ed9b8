"""Choice of signals, shrinkage and probabilities, on data whose truth is known."""

import numpy as np
import pytest
import scipy.special
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gnuq_serve.calibration.artefact import LogisticScore
from gnuq_serve.calibration.fit import FREE_SET, GRADIENT_SET, fit, fit_logistic, probabilities

FREE = ("log_probability", "mean_log_probability", "entropy", "max_entropy")
GRADIENT = ("log_grad_norm_sq", "log_input_grad_norm_sq")


def data(seed, count, *, weights, base=0.0):
    """Signals that are noise but for ``weights``, with scales far from one."""
    rng = np.random.default_rng(seed)
    names = [*FREE, *GRADIENT]
    standard = rng.normal(size=(count, len(names)))
    z = base + sum(weight * standard[:, names.index(name)] for name, weight in weights.items())
    correct = rng.random(count) < 1 / (1 + np.exp(-z))
    scales = np.array([30.0, 1.0, 0.5, 2.0, 5.0, 0.01])
    return standard * scales - 7.0, names, correct


def alone(correct):
    return np.arange(correct.size)


@pytest.mark.parametrize("strength", [0.01, 1.0, 10.0])
def test_the_probability_is_scikit_learns(strength):
    values, names, correct = data(0, 300, weights={"entropy": -1.0})
    model = fit_logistic(values, names, correct, strength)
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(values, correct)
    assert probabilities(model, values) == pytest.approx(oracle.predict_proba(values)[:, 1], abs=1e-9)


def test_one_signal_is_taken_where_one_says_it_all():
    values, names, correct = data(1, 400, weights={"entropy": -1.5})
    found = fit(values, names, correct, alone(correct))
    assert found.features == ("entropy",)
    assert found.model.weights[0] < 0
    assert [c.name for c in found.candidates if c.chosen] == ["entropy"]
    assert found.notes == ()


def test_a_set_is_taken_where_signals_add_up():
    values, names, correct = data(2, 600, weights={"entropy": -1.0, "log_probability": 1.0, "max_entropy": 1.0})
    found = fit(values, names, correct, alone(correct))
    assert found.features == FREE
    assert {c.name for c in found.candidates} == {*FREE, *GRADIENT, FREE_SET, GRADIENT_SET}


def test_the_gradient_is_taken_where_it_adds():
    values, names, correct = data(3, 600, weights={"entropy": -1.0, "log_grad_norm_sq": 1.0})
    assert set(GRADIENT) <= set(fit(values, names, correct, alone(correct)).features)


@pytest.mark.slow
def test_where_nothing_helps_nothing_costly_is_asked_for():
    asked = 0
    for seed in range(10):
        values, names, correct = data(100 + seed, 300, weights={})
        found = fit(values, names, correct, alone(correct), seed=seed)
        asked += bool(set(found.features) & set(GRADIENT))
        assert len(found.features) == 1
    assert asked <= 2


def test_noise_is_called_noise():
    values, names, correct = data(9, 1000, weights={})
    found = fit(values, names, correct, alone(correct))
    assert any("may carry nothing" in note for note in found.notes)


def test_left_out_probabilities_are_left_out():
    """A signal that names its row fits itself perfectly, and predicts nothing of a row left out."""
    rng = np.random.default_rng(4)
    correct = rng.random(200) < 0.5
    groups = np.arange(200) // 2
    correct[1::2] = correct[::2]
    # Both rows of a group carry the group's number, scrambled: only its own other row could tell the label.
    values = rng.permutation(100)[groups][:, None].astype(float)
    found = fit(values, ["entropy"], correct, groups)
    assert found.cross_validated.shape == (200,)
    right = found.cross_validated[correct].mean()
    assert right - found.cross_validated[~correct].mean() < 0.05


@pytest.mark.parametrize(("label", "word"), [(True, "right"), (False, "wrong")])
def test_one_kind_of_label_orders_by_the_mean_token_log_probability(label, word):
    values, names, _ = data(5, 40, weights={})
    correct = np.full(40, label)
    found = fit(values, names, correct, alone(correct))
    assert found.features == ("mean_log_probability",)
    assert any(f"all 40 answers for fitting are {word}" in note for note in found.notes)
    order = np.argsort(values[:, 1])
    assert (np.diff(probabilities(found.model, values[:, [1]])[order]) > 0).all()


def test_a_constant_signal_is_left_out():
    values, names, correct = data(6, 100, weights={"entropy": -1.0})
    values[:, 0] = 3.0
    found = fit(values, names, correct, alone(correct))
    assert "log_probability is the same on all rows and was left out" in found.notes
    assert "log_probability" not in {name for c in found.candidates for name in c.features}
    nothing = fit(np.ones((40, 1)), ["entropy"], np.arange(40) < 30, np.arange(40))
    assert nothing.features == ()
    assert nothing.model.probability([]) == pytest.approx(31 / 42)


def test_few_errors_still_fit():
    values, names, correct = data(7, 60, weights={})
    correct[:] = True
    correct[:3] = False
    found = fit(values, names, correct, alone(correct))
    assert len(found.features) >= 1
    assert np.isfinite(found.cross_validated).all()


def test_the_same_seed_gives_the_same_fit():
    values, names, correct = data(8, 200, weights={"entropy": -1.0})
    assert (
        fit(values, names, correct, alone(correct), seed=3).model
        == fit(values, names, correct, alone(correct), seed=3).model
    )


@pytest.mark.parametrize("z", [-1e6, -800.0, -40.0, 0.0, 40.0, 800.0])
def test_extreme_scores_stay_probabilities(z):
    p = LogisticScore(("entropy",), (0.0,), (1.0,), (1.0,), 0.0).probability([z])
    assert 0.0 <= p <= 1.0
    assert p == pytest.approx(scipy.special.expit(z), abs=1e-12)
