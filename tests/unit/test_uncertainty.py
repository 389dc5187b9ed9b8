import json
import math
from decimal import Decimal, getcontext

import numpy as np
import pytest

from gnuq_serve.uncertainty import (
    Signals,
    Trace,
    Uncertainty,
    bernoulli_variance,
    exp_or_none,
    finite_or_none,
    log_epistemic,
    log_or_none,
)

getcontext().prec = 60

NUMBERS = ("log_probability", "entropy", "aleatoric", "epistemic", "log_epistemic", "log_grad_norm_sq")


def scored(log_probabilities, grad_norm_sq=1.0, entropies=None, **kwargs):
    entropies = [0.5] * len(log_probabilities) if entropies is None else entropies
    return Uncertainty.scored(
        token_log_probabilities=log_probabilities,
        token_entropies=entropies,
        grad_norm_sq=grad_norm_sq,
        **kwargs,
    )


def every_number(uncertainty):
    data = uncertainty.to_dict()
    values = [data[name] for name in NUMBERS]
    values += [*data["normalized"].values(), *(v for v in data["signals"].values() if not isinstance(v, str))]
    return values + [v for series in (data["trace"] or {}).values() for v in series]


def test_ordinary_numbers_equal_the_formulas_written_out():
    log_probabilities = [-0.3, -1.1, -0.05, -2.0]
    entropies = [0.2, 1.5, 0.1, 0.9]
    norm_sq = 37.5
    result = scored(log_probabilities, norm_sq, entropies)

    s = np.prod(np.exp(np.array(log_probabilities)))
    p = s ** (1 / 4)
    assert result.status == "scored"
    assert (result.mode, result.span, result.tokens) == ("exact", "answer", 4)
    assert result.log_probability == pytest.approx(sum(log_probabilities), rel=1e-15)
    assert result.entropy == pytest.approx(np.mean(entropies), rel=1e-15)
    assert result.aleatoric == pytest.approx(s * (1 - s), rel=1e-13)
    assert result.epistemic == pytest.approx(s**2 * norm_sq, rel=1e-13)
    assert result.log_epistemic == pytest.approx(np.log(s**2 * norm_sq), rel=1e-13)
    assert result.log_grad_norm_sq == pytest.approx(np.log(norm_sq), rel=1e-15)
    assert result.normalized.probability == pytest.approx(p, rel=1e-13)
    assert result.normalized.aleatoric == pytest.approx(p * (1 - p), rel=1e-13)
    assert result.normalized.epistemic == pytest.approx(p**2 * norm_sq / 16, rel=1e-13)
    assert result.signals.min_token_log_probability == -2.0
    assert result.signals.max_entropy == 1.5
    assert result.signals.first_entropy == 0.2


def test_worked_example():
    result = scored([-2.81 / 8] * 8, math.exp(10.30))
    assert result.tokens == 8
    assert result.log_probability == pytest.approx(-2.81)
    assert result.aleatoric == pytest.approx(0.0566, abs=5e-5)
    assert result.epistemic == pytest.approx(107.8, abs=0.05)
    assert result.log_epistemic == pytest.approx(4.68)
    assert result.log_grad_norm_sq == pytest.approx(10.30)
    assert result.normalized.probability == pytest.approx(0.704, abs=5e-4)
    assert result.normalized.aleatoric == pytest.approx(0.208, abs=5e-4)
    assert result.normalized.epistemic == pytest.approx(230.1, abs=0.05)


@pytest.mark.parametrize("log_probability", [-1e-300, -1e-12, -1e-3, -0.7, -30.0, -120.0, -700.0])
def test_bernoulli_variance_is_exact_at_both_ends(log_probability):
    p = Decimal(log_probability).exp()
    # 1 - p has no digits left in 60 places for the smallest l; there it is -l.
    rest = 1 - p if log_probability < -1e-30 else -Decimal(log_probability)
    assert bernoulli_variance(log_probability) == pytest.approx(float(p * rest), rel=1e-14)


def test_bernoulli_variance_of_a_certain_answer_is_plain_zero():
    value = bernoulli_variance(0.0)
    assert value == 0.0
    assert math.copysign(1.0, value) == 1.0  # "-0.0" would stand in the JSON


@pytest.mark.parametrize(("total", "tokens"), [(-120.0, 40), (-2000.0, 500), (-2000.0, 1)])
def test_long_answers_keep_their_logarithms(total, tokens):
    norm_sq = 5.0e6
    result = scored([total / tokens] * tokens, norm_sq)
    log_norm_sq = Decimal(norm_sq).ln()
    assert result.log_probability == pytest.approx(total, rel=1e-14)
    assert result.log_epistemic == pytest.approx(float(2 * Decimal(total) + log_norm_sq), rel=1e-14)
    # Doubles down to 1e-308: e^-240 is one, e^-4000 is zero. Neither is an error.
    s = Decimal(total).exp()
    assert result.aleatoric == pytest.approx(float(s * (1 - s)), rel=1e-12)
    assert result.epistemic == pytest.approx(float(s * s * Decimal(norm_sq)), rel=1e-11)
    p = (Decimal(total) / tokens).exp()
    assert result.normalized.probability == pytest.approx(float(p), rel=1e-12)
    assert result.normalized.aleatoric == pytest.approx(float(p * (1 - p)), rel=1e-12)
    assert result.normalized.epistemic == pytest.approx(float(p * p * Decimal(norm_sq) / tokens**2), rel=1e-11)


def test_float32_would_have_underflowed():
    assert np.exp(np.float32(-120)) == 0
    assert scored([-120.0], 1.0).epistemic > 0


def test_a_nearly_certain_answer_keeps_its_aleatoric():
    result = scored([-1e-12], 1e-9)
    p = Decimal("-1e-12").exp()
    assert result.aleatoric == pytest.approx(float(p * (1 - p)), rel=1e-14)
    assert result.aleatoric != 1 - math.exp(-1e-12)  # what the naive form makes of it
    assert result.normalized.aleatoric == result.aleatoric


def test_sum_over_many_tokens_does_not_drift():
    values = [-0.1] * 100_000
    assert scored(values).log_probability == pytest.approx(float(Decimal("-0.1") * 100_000), rel=1e-15)


def test_log_epistemic_in_the_log_domain():
    assert log_epistemic(-2000.0, 15.0) == -3985.0


def test_gradient_of_zero():
    result = scored([-1.0, -2.0], 0.0)
    assert result.status == "scored"
    assert result.log_grad_norm_sq is None
    assert result.log_epistemic is None
    assert result.epistemic == 0.0
    assert result.normalized.epistemic == 0.0
    assert result.aleatoric == pytest.approx(math.exp(-3) * (1 - math.exp(-3)))


def test_numbers_beyond_a_double_are_none():
    result = scored([-1e-5], 1e308)
    assert result.epistemic == pytest.approx(1e308, rel=1e-4)
    huge = scored([-1e-3] * 4, 1.7e308)
    assert all(value is None or math.isfinite(value) for value in every_number(huge))
    assert exp_or_none(710.0) is None
    assert exp_or_none(-1e6) == 0.0
    assert finite_or_none(None) is None
    assert finite_or_none(math.inf) is None
    assert finite_or_none(math.nan) is None
    assert finite_or_none(1.5) == 1.5


@pytest.mark.parametrize(
    ("log_probabilities", "norm_sq"),
    [
        ([-1.0, math.nan], 1.0),
        ([-1.0, -math.inf], 1.0),
        ([math.inf], 1.0),
        ([-1.0], math.nan),
        ([-1.0], math.inf),
        ([-1.0], -math.inf),
    ],
)
def test_not_finite_inputs_fail_with_a_reason(log_probabilities, norm_sq):
    result = scored(log_probabilities, norm_sq)
    assert result.status == "failed"
    assert "not finite" in result.reason
    assert all(value is None for value in every_number(result))
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("entropies", [[math.nan, 1.0], [math.inf, 1.0], [1.0, math.nan]])
def test_not_finite_entropies_leave_the_rest(entropies):
    result = scored([-1.0, -1.0], 1.0, entropies)
    assert result.status == "scored"
    assert result.entropy is None
    assert result.epistemic == pytest.approx(math.exp(-4))
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize(("log_probabilities", "entropies"), [([], []), ([-1.0], []), ([-1.0], [1.0, 2.0])])
def test_lists_that_do_not_fit_are_refused(log_probabilities, entropies):
    with pytest.raises(ValueError, match="same length, at least 1"):
        scored(log_probabilities, 1.0, entropies)


@pytest.mark.parametrize(
    "uncertainty",
    [
        scored([-0.5, -1.5], 20.0, fingerprint="abc", seconds=0.25),
        scored([-2000.0], 20.0),
        scored([-1.0], 0.0),
        scored([-0.5, -1.5], 20.0, token_grad_norm_sq=[3.0, 0.0]),
        scored([-0.5, -1.5], 20.0, token_grad_norm_sq=[3.0, math.inf]),
        scored([-0.5], prompt_signals={"log_hidden_grad": -5.0, "hidden_position": "-4", "semgrad": 0.25}),
        scored([-0.5], mode="answer_only"),
        Uncertainty.failed("the scorer died"),
        Uncertainty.skipped("echo is not scored"),
        Uncertainty(status="pending", id="unc-1"),
        scored([-1.0]).replace(
            warnings=("a", "b"), tool_call=True, p_correct=0.5, decision="answer", calibration="c"
        ),
    ],
)
def test_round_trip_through_json(uncertainty):
    text = json.dumps(uncertainty.to_dict(), allow_nan=False)
    assert Uncertainty.from_dict(json.loads(text)) == uncertainty


def test_json_form():
    data = scored([-0.5]).to_dict()
    assert "reason" not in data
    assert data["warnings"] == []
    assert data["trace"] is None
    assert data["tool_call"] is False
    for name in ("id", "p_correct", "decision", "calibration", "seconds"):
        assert data[name] is None
    assert Uncertainty.failed("why").to_dict()["reason"] == "why"
    assert Uncertainty.skipped("why").status == "skipped"


def test_unknown_fields_are_ignored_and_absent_ones_get_defaults():
    data = scored([-0.5]).to_dict()
    newer = data | {
        "semantic": {"a": 1},
        "normalized": data["normalized"] | {"new": 1.0},
        "signals": data["signals"] | {"quux": 2.0},
    }
    assert Uncertainty.from_dict(newer) == scored([-0.5])
    bare = Uncertainty.from_dict({"status": "pending", "normalized": None, "signals": None, "warnings": None})
    assert bare == Uncertainty(status="pending")


def test_trace_equals_the_formulas_written_out():
    log_probabilities, entropies, norms = [-0.3, -1.1, -0.05], [0.2, 1.5, 0.1], [7.0, 40.0, 0.5]
    trace = scored(log_probabilities, 37.5, entropies, token_grad_norm_sq=norms).trace
    p = np.exp(log_probabilities)
    assert trace.entropy == tuple(entropies)
    assert trace.aleatoric == pytest.approx(p * (1 - p), rel=1e-13)
    assert trace.epistemic == pytest.approx(p**2 * norms, rel=1e-13)


def test_trace_of_one_token_is_the_whole():
    result = scored([-0.7], 12.0, [0.4], token_grad_norm_sq=[12.0])
    assert result.trace.entropy == (result.entropy,)
    assert result.trace.aleatoric == (result.aleatoric,)
    assert result.trace.epistemic == pytest.approx((result.epistemic,))


def test_trace_holds_finite_numbers_or_none():
    entropies = [0.1, math.nan, math.inf, 0.2]
    norms = [0.0, math.nan, math.inf, 1e308]
    log_probabilities = [-1.0, -800.0, -1.0, 0.0]
    result = scored(log_probabilities, 1.0, entropies, token_grad_norm_sq=norms)
    assert result.trace.entropy == (0.1, None, None, 0.2)
    assert result.trace.epistemic == (0.0, None, None, pytest.approx(1e308))
    assert result.trace.aleatoric[1] == 0.0  # a probability under the smallest double
    assert scored([-800.0], token_grad_norm_sq=[5.0]).trace.epistemic == (0.0,)
    assert scored([-1e-5], token_grad_norm_sq=[-1.0]).trace.epistemic == (None,)
    json.dumps(result.to_dict(), allow_nan=False)


def test_trace_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="zip"):
        scored([-1.0, -2.0], token_grad_norm_sq=[1.0])


def test_trace_in_json():
    data = scored([-0.5, -1.5], token_grad_norm_sq=[3.0, 4.0]).to_dict()
    assert {name: type(series) for name, series in data["trace"].items()} == {
        "entropy": list,
        "aleatoric": list,
        "epistemic": list,
    }
    read = Uncertainty.from_dict({"status": "scored", "trace": {"entropy": [1.0, None], "newer": [2.0]}})
    assert read.trace == Trace(entropy=(1.0, None), aleatoric=(), epistemic=())


def test_signals_of_the_prompt():
    plain = scored([-0.5, -1.5])
    assert plain.signals == Signals(min_token_log_probability=-1.5, max_entropy=0.5, first_entropy=0.5)
    signals = {
        "log_input_grad_norm_sq": 3.2,
        "log_hidden_grad": -5.1,
        "hidden_position": "mean",
        "semgrad": 0.1,
        "exgrad": 0.2,
        "paragrad": 0.3,
        "hybridgrad": None,
    }
    result = scored([-0.5, -1.5], prompt_signals=signals)
    data = result.to_dict()["signals"]
    assert data == plain.to_dict()["signals"] | signals
    assert Uncertainty.from_dict(result.to_dict()) == result


def test_logarithm_of_what_has_none():
    assert log_or_none(math.e) == pytest.approx(1.0)
    assert log_or_none(1e-320) == pytest.approx(-320 * math.log(10), rel=1e-4)
    for value in (None, 0.0, -1.0, math.inf, math.nan):
        assert log_or_none(value) is None


@pytest.mark.parametrize("data", [{}, {"status": None}, {"status": "Scored"}, {"status": "done"}])
def test_bad_status_is_refused(data):
    with pytest.raises(ValueError, match="expected scored, pending, skipped or failed"):
        Uncertainty.from_dict(data)
