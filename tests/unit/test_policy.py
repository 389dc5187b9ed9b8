import pytest

from gnuq_serve.policy import UNCALIBRATED, Policy
from gnuq_serve.uncertainty import Normalized, Signals, Uncertainty


def answer(**fields):
    return Uncertainty(status="scored", **fields)


@pytest.mark.parametrize(
    ("p_correct", "action"),
    [(0.9, "answer"), (0.8, "answer"), (0.79, "escalate"), (0.4, "escalate"), (0.39, "human"), (0.0, "human")],
)
def test_thresholds_are_inclusive(p_correct, action):
    policy = Policy(answer=0.8, escalate=0.4, otherwise="human")
    decision = policy.decide(answer(p_correct=p_correct, calibration="faq@1"))
    assert decision.action == action
    assert decision.value == p_correct
    assert decision.calibration == "faq@1"
    assert "p_correct" in decision.reason


def test_without_escalate_there_are_two_outcomes():
    policy = Policy(answer=0.8)
    assert policy.decide(answer(p_correct=0.8)).action == "answer"
    below = policy.decide(answer(p_correct=0.7))
    assert below.action == "abstain"
    assert below.reason == "p_correct 0.7 < 0.8"


@pytest.mark.parametrize(
    ("signal", "fields", "value"),
    [
        ("log_probability", {"log_probability": -2.0}, -2.0),
        ("normalized.probability", {"normalized": Normalized(probability=0.7)}, 0.7),
        ("signals.min_token_log_probability", {"signals": Signals(min_token_log_probability=-1.0)}, -1.0),
        ("-entropy", {"entropy": 0.5}, -0.5),
        ("-aleatoric", {"aleatoric": 0.1}, -0.1),
        ("-epistemic", {"epistemic": 107.8}, -107.8),
        ("-log_epistemic", {"log_epistemic": 4.68}, -4.68),
        ("-log_grad_norm_sq", {"log_grad_norm_sq": 10.3}, -10.3),
        ("-normalized.aleatoric", {"normalized": Normalized(aleatoric=0.2)}, -0.2),
        ("-normalized.epistemic", {"normalized": Normalized(epistemic=230.1)}, -230.1),
        ("-signals.max_entropy", {"signals": Signals(max_entropy=1.7)}, -1.7),
        ("-signals.first_entropy", {"signals": Signals(first_entropy=0.9)}, -0.9),
    ],
)
def test_raw_signals_with_their_sign(signal, fields, value):
    surer, less_sure = Policy(signal=signal, answer=value), Policy(signal=signal, answer=value + 1e-6)
    decision = surer.decide(answer(**fields))
    assert (decision.action, decision.value, decision.signal) == ("answer", value, signal)
    assert decision.calibration == UNCALIBRATED
    assert less_sure.decide(answer(**fields)).action == "abstain"


def test_zero_is_a_value():
    assert Policy(signal="-entropy", answer=-0.5).decide(answer(entropy=0.0)).action == "answer"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"signal": "p_corect", "answer": 0.8}, r"signal='p_corect' is unknown; choose one of .*p_correct"),
        ({"signal": "-", "answer": 0.8}, "is unknown; choose one of"),
        ({"signal": "normalized", "answer": 0.8}, "normalized.probability"),
        ({"signal": "entropy", "answer": 0.8}, "write '-entropy'"),
        ({"signal": "-p_correct", "answer": 0.8}, "write 'p_correct'"),
        ({"signal": "--entropy", "answer": 0.8}, "is unknown"),
        ({"answer": 0.4, "escalate": 0.8}, "escalate=0.8 must be below answer=0.4"),
        ({"answer": 0.4, "escalate": 0.4}, "escalate=0.4 must be below answer=0.4"),
        ({"answer": 0.4, "otherwise": "ask"}, "choose one of answer, escalate, human, abstain"),
    ],
)
def test_mistakes_name_the_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        Policy(**fields)


@pytest.mark.parametrize(
    ("uncertainty", "signal", "reason"),
    [
        (Uncertainty.failed("it died"), "-entropy", "the answer was not scored: failed (it died)"),
        (Uncertainty.skipped("echo"), "p_correct", "the answer was not scored: skipped (echo)"),
        (answer(entropy=1.0), "p_correct", "no calibration is loaded"),
        (answer(), "-entropy", "-entropy is null"),
    ],
)
def test_a_missing_signal_decides_nothing_and_says_why(uncertainty, signal, reason):
    policy = Policy(signal=signal, answer=0.0)
    decision = policy.decide(uncertainty)
    assert decision.action is None
    assert decision.value is None
    assert reason in decision.reason
    assert policy.apply(uncertainty) == uncertainty


def test_apply_fills_in_decision_and_what_it_rests_on():
    raw = answer(log_grad_norm_sq=10.3)
    applied = Policy(signal="-log_grad_norm_sq", answer=-11).apply(raw)
    assert applied == raw.replace(decision="answer", calibration=UNCALIBRATED)
    calibrated = answer(p_correct=0.5, calibration="faq@1")
    applied = Policy(answer=0.8, escalate=0.4).apply(calibrated)
    assert applied == calibrated.replace(decision="escalate", calibration="faq@1")


def test_a_raw_signal_is_uncalibrated_even_where_a_calibration_is_loaded():
    both = answer(p_correct=0.5, calibration="faq@1", entropy=0.1)
    assert Policy(signal="-entropy", answer=-1).apply(both).calibration == UNCALIBRATED


@pytest.mark.parametrize("thresholds", [{"answer": float("nan")}, {"answer": 0.9, "escalate": float("-inf")}])
def test_thresholds_must_be_finite(thresholds):
    with pytest.raises(ValueError, match="must be a finite number"):
        Policy(**thresholds)


class Calibrated:
    """What `Policy.from_calibration` asks of a calibration; the real one is in test_calibration_outcome."""

    id = "faq@77b1"
    levels = (0.1, 0.2)

    def threshold_for(self, max_error=None):
        return {None: 0.8, 0.1: 0.8, 0.2: 0.6, 0.01: None}[max_error]

    def why_none(self, max_error=None):
        return "no threshold of calibration faq@77b1 keeps errors under 0.01; the best is .1"


def test_a_calibrated_policy_holds_the_promised_threshold():
    policy = Policy.from_calibration(Calibrated(), max_error=0.2, escalate=0.4, otherwise="human")
    assert policy == Policy(answer=0.6, escalate=0.4, otherwise="human", calibration="faq@77b1", max_error=0.2)
    assert Policy.from_calibration(Calibrated()).max_error == 0.1
    assert policy.decide(answer(p_correct=0.6, calibration="faq@77b1")).action == "answer"
    with pytest.raises(ValueError, match=r"the best is \.1; ask for a higher max_error, or more data"):
        Policy.from_calibration(Calibrated(), max_error=0.01)


def test_a_calibrated_policy_decides_on_its_own_calibration_only():
    policy = Policy.from_calibration(Calibrated())
    for other in ("faq@0000", None):
        decision = policy.decide(answer(p_correct=0.9, calibration=other))
        assert decision.action is None
        assert decision.reason == f"p_correct is from calibration {other}, the threshold from faq@77b1"
    assert "no calibration is loaded" in policy.decide(answer()).reason


def test_from_yaml(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("answer: 0.8\nescalate: 0.5\notherwise: human\n", encoding="utf-8")
    assert Policy.load(path) == Policy(answer=0.8, escalate=0.5, otherwise="human")
    path.write_text("signal: -entropy\nanswer: -1\nescalate: null\n", encoding="utf-8")
    assert Policy.load(path) == Policy(signal="-entropy", answer=-1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("answr: 0.8", "unknown key 'answr'; did you mean 'answer'?"),
        ("zzz: 0.8", "unknown key 'zzz'; choose from signal, answer"),
        ("escalate: 0.5", "answer is missing"),
        ("answer: high", "answer must be a number, not 'high'"),
        ("answer: true", "answer must be a number, not True"),
        ("answer:", "answer must be a number, not None"),
        ("answer: 0.8\notherwise: 3", "otherwise must be a string, not 3"),
        ("answer: 0.8\nescalate: 0.9", "escalate=0.9 must be below answer=0.8"),
        ("- 0.8", "a mapping such as `answer: 0.8` is expected, not list"),
        ("", "is expected, not NoneType"),
        ("answer: [", "not YAML"),
        ("answer: 0.8\nmax_error: 0.1", "use Policy.from_calibration"),
        ("signal: -entropy\nanswer: 0.8\ncalibration: faq@1", "needs signal='p_correct'"),
    ],
)
def test_yaml_mistakes_name_file_and_remedy(tmp_path, text, message):
    path = tmp_path / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"policy\.yaml") as error:
        Policy.load(path)
    assert message in str(error.value)
