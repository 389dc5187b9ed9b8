import math

import pytest

from gnuq_serve.service.consistency import check_log_probability, tolerance
from gnuq_serve.uncertainty import Uncertainty


def scored(log_probability=-10.0, tokens=8):
    return Uncertainty(status="scored", log_probability=log_probability, tokens=tokens)


def test_tolerance_is_that_of_the_coarsest_dtype():
    assert tolerance(8, "float32") == tolerance(8, "float64", "float32")
    assert tolerance(8, "float32") < tolerance(8, "float16", "float32") < tolerance(8, "float32", "bfloat16")
    assert tolerance(8, "fp8_unheard_of") == tolerance(8, "bfloat16")


def test_tolerance_grows_like_a_random_walk_from_32_tokens():
    assert tolerance(1, "float32") == tolerance(32, "float32")
    assert tolerance(3200, "float32") == pytest.approx(10 * tolerance(32, "float32"))
    assert tolerance(64, "bfloat16") == pytest.approx(math.sqrt(2) * tolerance(32, "bfloat16"))


@pytest.mark.parametrize("difference", [0.0, 0.009, -0.009])
def test_rounding_is_no_cause_for_a_warning(difference):
    uncertainty = scored()
    assert check_log_probability(uncertainty, -10.0 + difference, "float32", "float32") is uncertainty


@pytest.mark.parametrize("difference", [0.02, -0.02])
def test_a_difference_is_told_with_both_numbers(difference):
    before = scored().replace(warnings=("earlier",))
    after = check_log_probability(before, -10.0 + difference, "float32", "float32")
    assert after.warnings[0] == "earlier"
    assert len(after.warnings) == 2
    assert "-10.0000" in after.warnings[1]
    assert f"{-10.0 + difference:.4f}" in after.warnings[1]
    assert after.replace(warnings=("earlier",)) == before
    assert check_log_probability(before, -10.0 + difference, "bfloat16", "float32") is before


def test_nothing_to_compare():
    uncertainty = scored()
    assert check_log_probability(uncertainty, None, "float32") is uncertainty
    failed = Uncertainty.failed("why")
    assert check_log_probability(failed, -1.0, "float32") is failed
