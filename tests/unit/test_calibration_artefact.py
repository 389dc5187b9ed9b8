import json
import math
import subprocess
import sys

import pytest

import gnuq_serve
from gnuq_serve import Calibration, Signals, Uncertainty
from gnuq_serve.calibration.artefact import CalibrationError, Data, LogisticScore, Seen
from gnuq_serve.calibration.features import FEATURES, read_features
from gnuq_serve.calibration.guarantee import BandPoint, Promise


def promise(level, threshold):
    return Promise(
        max_error=level,
        confidence=0.95,
        threshold=threshold,
        answered=80 if threshold is not None else 0,
        errors=2,
        share=0.4 if threshold is not None else 0.0,
        upper=level if threshold is not None else None,
        first_count=30,
        sentence="as the guarantee says it",
    )


def point(threshold, answered, upper):
    return BandPoint(
        threshold=threshold, answered=answered, errors=3, share=answered / 200, risk=3 / answered, upper=upper
    )


def calibration(**changes):
    fields = {
        "name": "support-faq",
        "model": LogisticScore(
            ("mean_log_probability", "log_grad_norm_sq"), (-1.0, 10.0), (0.5, 2.0), (1.25, -0.75), 0.3
        ),
        "confidence": 0.95,
        "promises": (promise(0.1, 0.7), promise(0.05, None)),
        "band": (point(0.9, 50, 0.15), point(0.5, 100, 0.18), point(0.0, 200, 0.4)),
        "seen": Seen(answer_tokens=(2, 30), prompt_tokens=(10, 90), turns=(1, 3), finish_reasons=("stop",)),
        "fingerprint": {"scorer": "3f9c2a", "mode": "exact", "chat_template": "a1"},
        "data": Data(
            rows=400,
            fit_rows=200,
            held_out_rows=200,
            held_out_units=200,
            accuracy=0.6,
            auroc=0.7,
            ece=0.04,
            brier_skill=0.1,
        ),
        "reference_scores": (0.1, 0.5, 0.9),
    }
    return Calibration(**{**fields, **changes})


def answer(**changes):
    fields = {
        "status": "scored",
        "mode": "exact",
        "span": "answer",
        "tokens": 4,
        "log_probability": -2.0,
        "log_grad_norm_sq": 9.0,
        "fingerprint": "3f9c2a",
    }
    return Uncertainty(**{**fields, **changes})


P = 1 / (1 + math.exp(-(0.3 + 1.25 * (-0.5 + 1.0) / 0.5 - 0.75 * (9.0 - 10.0) / 2.0)))


def test_it_fills_in_probability_decision_and_name():
    found = calibration().apply(answer(), prompt_tokens=50, turns=1, finish_reason="stop")
    assert found.p_correct == pytest.approx(P, rel=1e-12)
    assert found == answer().replace(p_correct=found.p_correct, decision="answer", calibration=calibration().id)
    assert calibration().apply(Uncertainty.from_dict(answer().to_dict())) == found


def test_the_threshold_is_inclusive_and_below_it_the_answer_is_withheld():
    exactly = calibration(promises=(promise(0.1, calibration().apply(answer()).p_correct),))
    assert exactly.apply(answer()).decision == "answer"
    above = math.nextafter(calibration().apply(answer()).p_correct, 1)
    assert calibration(promises=(promise(0.1, above),)).apply(answer()).decision == "abstain"


def test_levels_named_in_advance_have_their_threshold_and_others_the_bands():
    found = calibration()
    assert found.levels == (0.1, 0.05)
    assert found.threshold_for() == found.threshold_for(0.1) == found.threshold_for(0.1 + 1e-17) == 0.7
    assert found.threshold_for(0.05) is None
    assert found.threshold_for(0.15) == 0.9
    assert found.threshold_for(0.2) == 0.5
    assert found.threshold_for(0.4) == 0.0
    assert found.threshold_for(0.14) is None
    with pytest.raises(ValueError, match=r"max_error=10 must lie between 0 and 1"):
        found.apply(answer(), max_error=10)


def test_a_level_out_of_reach_answers_nothing_and_says_what_is_in_reach():
    found = calibration().apply(answer(), max_error=0.05)
    assert (found.decision, found.calibration) == ("abstain", calibration().id)
    assert found.p_correct == pytest.approx(P)
    assert "keeps errors under 0.05; the best that its data supports is 0.15 at 25% answered" in found.warnings[0]


@pytest.mark.parametrize("status", ["pending", "skipped", "failed"])
def test_what_is_not_scored_comes_back_as_it_is(status):
    unscored = Uncertainty(status=status, reason="so")
    assert calibration().apply(unscored) == unscored


@pytest.mark.parametrize(
    ("changes", "context", "said"),
    [
        ({"fingerprint": "other"}, {}, ["scorer is other, calibrated on 3f9c2a"]),
        ({"mode": "answer_only"}, {}, ["mode is answer_only, calibrated on exact"]),
        ({}, {"parts": {"chat_template": "b2"}}, ["chat_template is b2, calibrated on a1"]),
        ({"tokens": 31}, {}, ["answer of 31 tokens, seen 2 to 30"]),
        ({"tokens": 1}, {}, ["answer of 1 tokens"]),
        ({}, {"prompt_tokens": 91}, ["prompt of 91 tokens, seen 10 to 90"]),
        ({}, {"turns": 4}, ["4 turns, seen 1 to 3"]),
        ({}, {"finish_reason": "length"}, ["finish_reason 'length', seen stop"]),
        ({"tool_call": True}, {}, ["a tool call, seen none"]),
        ({"log_grad_norm_sq": None}, {}, ["the score lacks log_grad_norm_sq", "gradient pass"]),
        ({"fingerprint": "other", "tokens": 40}, {}, ["scorer is other", "answer of 40 tokens"]),
    ],
)
def test_where_it_does_not_apply_raw_numbers_stay_and_a_warning_names_each_part(changes, context, said):
    raw = answer(**changes, p_correct=0.9, decision="answer", calibration="old@1", warnings=("earlier",))
    found = calibration().apply(raw, **context)
    assert found.warnings[0] == "earlier"
    assert f"calibration {calibration().id} does not apply" in found.warnings[1]
    assert all(part in found.warnings[1] for part in said)
    bare = raw.replace(p_correct=None, decision=None, calibration=None, warnings=found.warnings)
    assert found == bare
    assert calibration().apply(found, **context) == found  # the warning is not repeated


def test_parts_that_nobody_knows_are_not_checked():
    found = calibration().apply(answer(fingerprint=None), parts={"dtype": "float16", "chat_template": "a1"})
    assert found.p_correct is not None
    assert calibration(seen=Seen()).apply(answer(tokens=10_000), prompt_tokens=5).p_correct is not None


def test_what_it_requires():
    assert calibration().requires.gradient
    assert not calibration().requires.semantic
    free = calibration(model=LogisticScore(("entropy",), (0.0,), (1.0,), (-1.0,), 0.0))
    assert not free.requires.gradient
    assert free.apply(answer(entropy=0.5, log_grad_norm_sq=None)).p_correct == pytest.approx(
        1 / (1 + math.exp(0.5))
    )
    semantic = calibration(model=LogisticScore(("log_semgrad",), (0.0,), (1.0,), (-1.0,), 0.0))
    assert semantic.requires.gradient
    assert semantic.requires.semantic
    assert '"semantic": true' in semantic.apply(answer()).warnings[0]


def test_the_file_comes_back_the_same(tmp_path):
    path = tmp_path / "calibration.json"
    calibration().save(path)
    again = Calibration.load(path)
    assert again == calibration()
    assert again.id == calibration().id
    assert again.id.startswith("support-faq@")
    assert len(again.id) == len("support-faq@") + 4
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["schema"], content["version"]) == ("gnuq-serve/calibration", 1)
    assert content["requires"] == {"gradient": True, "semantic": False}
    assert content["promises"][0]["threshold"] == 0.7
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) < 500


def test_the_id_follows_the_content():
    assert calibration().id != calibration(confidence=0.9).id
    assert calibration().id != calibration(promises=(promise(0.1, 0.71),)).id


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.update(schema="other"), "not a calibration file"),
        (lambda content: content.update(version=2), "reads version 1: install the gnuq-serve that wrote it"),
        (lambda content: content["promises"][0].update(threshold=0.2), "edited by hand"),
        (lambda content: content.update(name="other"), "edited by hand"),
        (lambda content: content.pop("band"), "damaged .KeyError: 'band'"),
        (lambda content: content.update(model=3), "damaged"),
        (lambda content: content.update(promises=[]), "damaged .*no promises"),
        (
            lambda content: content["model"]["features"][0].update(name="new_signal"),
            "unknown features new_signal",
        ),
        (lambda content: content["promises"][0].pop("share"), "damaged"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, change, said):
    path = tmp_path / "calibration.json"
    calibration().save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CalibrationError, match=said) as error:
        Calibration.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\ud800"])
def test_what_is_no_json_object(tmp_path, text):
    path = tmp_path / "calibration.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CalibrationError, match=r"not JSON|not a calibration file"):
        Calibration.load(path)
    with pytest.raises(CalibrationError, match="No such file"):
        Calibration.load(tmp_path / "absent.json")


def test_features_are_read_from_the_served_object():
    signals = Signals(min_token_log_probability=-1.9, max_entropy=1.7, first_entropy=0.9)
    found = answer(entropy=0.4, signals=signals)
    assert read_features(found, list(FEATURES)[:7]) == pytest.approx(
        [-2.0, -0.5, -1.9, 0.4, 1.7, 0.9, math.log(4)]
    )
    assert read_features(found, ["log_grad_norm_sq", "log_mean_grad_norm_sq"]) == pytest.approx(
        [9.0, 9.0 - 2 * math.log(4)]
    )
    for name, feature in FEATURES.items():
        if feature.of is not None:
            (value,), (log,) = read_features(found, [feature.of]), read_features(found, [name])
            assert log == pytest.approx(math.log(abs(value)))
    assert read_features(answer(entropy=0.0), ["log_entropy"]) == [math.log(1e-4)]
    assert read_features(Uncertainty(status="failed"), FEATURES) == [None] * len(FEATURES)
    assert read_features(answer(log_probability=float("nan"), tokens=0), FEATURES)[:2] == [None, None]


def test_applying_needs_no_scikit_learn():
    code = (
        "import sys; from gnuq_serve import Calibration, Policy; import gnuq_serve.calibration.drift, "
        "gnuq_serve.calibration.audit; "
        "bad = {'sklearn', 'scipy', 'torch', 'matplotlib'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert gnuq_serve.Calibration is Calibration
