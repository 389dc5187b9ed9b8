"""The operator's calibrations and policy, on every result."""

import asyncio
import hashlib
import json
import math

import httpx
import pytest
from made_calibration import made_calibration, promise, saved
from starlette.applications import Starlette

from gnuq_serve import Uncertainty
from gnuq_serve.calibration.artefact import LogisticScore, Seen
from gnuq_serve.service.answer import Answer
from gnuq_serve.service.decisions import Answered, Decisions
from gnuq_serve.service.requests.request_plan import DEFAULT_OPTIONS, InvalidRequestError, RequestOptions
from gnuq_serve.service.routes import routes
from gnuq_serve.service.seeing.observation import RequestContext
from gnuq_serve.service.served import ServedModel
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings.model import Settings
from gnuq_serve.service.settings.sources import SettingsError


def settings(**fields):
    return Settings.model_validate(fields)


def scored(mean=-0.1, **changes):
    return Uncertainty.scored(
        token_log_probabilities=[mean] * 4,
        token_entropies=[0.1] * 4,
        grad_norm_sq=90.0,
        fingerprint="f1",
    ).replace(**changes)


def p_correct(mean):
    return 1 / (1 + math.exp(-1.25 * (mean + 1) / 0.5))


def decide(loaded, uncertainty, name=None, **answered):
    return loaded.decide(uncertainty, loaded.name_for(name), Answered(**answered))


def test_without_calibration_and_policy_a_result_stays_as_it_is():
    assert decide(Decisions.load(settings()), scored()) == scored()


@pytest.mark.parametrize(("mean", "decision"), [(-0.1, "answer"), (-0.9, "abstain")])
def test_the_only_calibration_is_the_default(tmp_path, mean, decision):
    loaded = Decisions.load(settings(calibrations={"faq": saved(tmp_path)}))
    found = decide(loaded, scored(mean))
    assert found.p_correct == pytest.approx(p_correct(mean))
    assert (found.decision, found.calibration) == (decision, made_calibration().id)
    assert found.replace(p_correct=None, decision=None, calibration=None) == scored(mean)


@pytest.mark.parametrize("status", ["skipped", "failed", "pending"])
def test_an_answer_without_a_score_gets_no_decision(tmp_path, status):
    loaded = Decisions.load(settings(calibrations={"faq": saved(tmp_path)}, policy={"answer": 0.5}))
    assert decide(loaded, Uncertainty(status=status)) == Uncertainty(status=status)


def test_request_then_key_then_default(tmp_path):
    key = hashlib.sha256(b"sk-support").hexdigest()
    names = {name: saved(tmp_path, name) for name in ("faq", "law", "code")}
    loaded = Decisions.load(
        settings(calibrations=names, default_calibration="faq", calibration_by_key={key: "law"})
    )
    assert loaded.name_for(None) == "faq"
    assert loaded.name_for(None, key) == "law"
    assert loaded.name_for(None, "0" * 64) == "faq"
    assert loaded.name_for("code", key) == "code"
    assert decide(loaded, scored(), "code").calibration.startswith("code@")
    with pytest.raises(InvalidRequestError, match=r"calibration='cod' is unknown; known: faq, law, code"):
        loaded.check_name("cod")
    assert Decisions.load(settings(calibrations=names)).name_for(None) is None  # several, and none preferred
    with pytest.raises(InvalidRequestError, match="none is loaded here"):
        Decisions.load(settings()).check_name("faq")


@pytest.mark.parametrize(
    ("bound", "answered", "said"),
    [
        ({"fingerprint": {"scorer": "other"}}, {}, "scorer is f1, calibrated on other"),
        ({"fingerprint": {"mode": "answer_only"}}, {}, "mode is exact, calibrated on answer_only"),
        (
            {"fingerprint": {"sampling": "temperature=0"}},
            {"parts": {"sampling": "temperature=1"}},
            "sampling is temperature=1, calibrated on temperature=0",
        ),
        ({"seen": Seen(prompt_tokens=(5, 9))}, {"prompt_tokens": 10}, "prompt of 10 tokens, seen 5 to 9"),
        ({"seen": Seen(turns=(1, 1))}, {"turns": 2}, "2 turns, seen 1 to 1"),
        ({"seen": Seen(finish_reasons=("stop",))}, {"finish_reason": "length"}, "finish_reason 'length'"),
    ],
)
@pytest.mark.parametrize("policy", [None, {"answer": 0.1}, {"escalate": 0.1}])
def test_where_a_calibration_does_not_apply_raw_numbers_stay_and_a_warning_says_why(
    tmp_path, bound, answered, said, policy
):
    loaded = Decisions.load(settings(calibrations={"faq": saved(tmp_path, **bound)}, policy=policy))
    found = decide(loaded, scored(), **answered)
    assert (found.p_correct, found.decision, found.calibration) == (None, None, None)
    assert said in found.warnings[0]
    assert found.log_probability == scored().log_probability


def test_a_policy_by_hand(tmp_path):
    path = tmp_path / "policy.yaml"
    policy = {"answer": 0.95, "escalate": 0.5, "otherwise": "human"}
    path.write_text(json.dumps(policy))
    for given in (policy, str(path)):
        loaded = Decisions.load(settings(calibrations={"faq": saved(tmp_path)}, policy=given))
        actions = [decide(loaded, scored(mean)).decision for mean in (-0.0001, -0.4, -0.9, -2)]
        # p_correct: 0.92, 0.82, 0.56, 0.08; the calibration's own threshold 0.7 has no say
        assert actions == ["escalate", "escalate", "escalate", "human"]


def test_a_policy_with_the_calibrations_threshold(tmp_path):
    loaded = Decisions.load(
        settings(calibrations={"faq": saved(tmp_path)}, policy={"escalate": 0.5, "otherwise": "human"})
    )
    actions = [decide(loaded, scored(mean)).decision for mean in (-0.1, -0.9, -2)]
    assert actions == ["answer", "escalate", "human"]
    assert loaded.policies["faq"].answer == 0.7


def test_a_policy_on_a_raw_number_needs_no_calibration_and_says_so(tmp_path):
    policy = {"signal": "normalized.probability", "answer": 0.8}
    for more in ({}, {"calibrations": {"a": saved(tmp_path, "a"), "b": saved(tmp_path, "b")}}):
        found = decide(Decisions.load(settings(policy=policy, **more)), scored())
        assert (found.decision, found.calibration) == ("answer", "uncalibrated")


def test_a_level(tmp_path):
    """0.2 was not named in advance: its threshold comes from the band."""
    loaded = Decisions.load(settings(calibrations={"faq": saved(tmp_path)}, max_error=0.2))
    assert decide(loaded, scored(-0.95)).decision == "answer"  # p_correct 0.53


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"calibrations": {"faq": "nowhere.json"}}, r"calibrations.faq: nowhere.json: No such file"),
        ({"calibrations": {"faq": "FAQ"}, "max_error": 0.05}, "keeps errors under 0.05.*set max_error higher"),
        ({"calibrations": {"faq": "FAQ"}, "policy": {"escalate": 0.9}}, r"policy: escalate=0.9 must be below"),
        ({"calibrations": {"faq": "FAQ"}, "policy": {"anwser": 0.9}}, "did you mean 'answer'"),
        ({"calibrations": {"faq": "FAQ"}, "policy": {"answer": 0.9}, "max_error": 0.2}, "leave one of them out"),
        (
            {"calibrations": {"faq": "FAQ"}, "policy": {"answer": 0.9, "calibration": "law@1"}},
            "calibration law@1",
        ),
        ({"calibrations": {"faq": "FAQ"}, "policy": {"signal": "-entropy"}}, "policy: answer is missing"),
        ({"policy": {"answer": 0.9}}, "p_correct comes from a calibration; name one in calibrations"),
        ({"policy": {"otherwise": "human"}}, "policy: answer is missing"),
        ({"policy": "nowhere.yaml"}, "policy: nowhere.yaml"),
        (
            {"calibrations": {"a": "FAQ", "b": "FAQ"}, "on_uncertain": "abstain"},
            "one of a, b as default_calibration",
        ),
        ({"calibrations": {"a": "NONE"}, "on_uncertain": "abstain"}, "no threshold .*; set max_error higher"),
        ({"calibrations": {"a": "FAQ"}, "mode": "answer_only", "on_uncertain": "abstain"}, "set mode to exact"),
    ],
)
def test_what_cannot_work_is_an_error_that_names_the_remedy(tmp_path, fields, said):
    paths = {"FAQ": saved(tmp_path), "NONE": saved(tmp_path, "none", promises=(promise(0.1, None),))}
    if "calibrations" in fields:
        named = {name: paths.get(path, path) for name, path in fields["calibrations"].items()}
        fields = fields | {"calibrations": named}
    with pytest.raises(SettingsError, match=said):
        Decisions.load(settings(**fields))


def test_without_gating_a_calibration_that_keeps_no_level_still_gives_p_correct(tmp_path, caplog):
    loaded = Decisions.load(settings(calibrations={"a": saved(tmp_path, promises=(promise(0.1, None),))}))
    assert "always `abstain`" in caplog.text
    found = decide(loaded, scored())
    assert found.p_correct == pytest.approx(p_correct(-0.1))
    assert found.decision == "abstain"


class Scorer:
    """In the scorer client's place; remembers what it was asked."""

    class State:
        dtype = "float32"

    state = State()

    def __init__(self):
        self.asked = []

    async def score(self, prompt_ids, answer_ids, deadline_seconds, options, *more):
        self.asked.append(options)
        return scored(-0.1, mode=options.mode)


def service_with(**fields):
    service = UncertaintyService(settings(keep_results=0, **fields))
    service.served = ServedModel(model="m", dtype="float32", raw_logprobs=False)
    service._client = Scorer()
    return service


def score_one(service, *, prompt=3, answer=None, options=DEFAULT_OPTIONS, **context):
    given = answer or Answer([1] * prompt, [2, 3, 4, 5], finish_reason="stop")
    (found,) = asyncio.run(service.score([given], options, RequestContext(**context)))
    return found


def test_every_result_of_the_service_is_decided(tmp_path):
    found = score_one(service_with(calibrations={"faq": saved(tmp_path)}))
    assert (found["decision"], found["calibration"]) == ("answer", made_calibration().id)
    assert found["p_correct"] == pytest.approx(p_correct(-0.1))


def test_the_service_hands_over_all_that_is_checked(tmp_path):
    seen = Seen(
        answer_tokens=(1, 3), prompt_tokens=(9, 9), turns=(1, 1), finish_reasons=("length",), tool_calls=False
    )
    path = saved(tmp_path, seen=seen, fingerprint={"sampling": "greedy", "scorer": "f2"})
    answer = Answer([1] * 3, [2, 3, 4, 5], finish_reason="stop", tool_call=True)
    service = service_with(calibrations={"faq": path})
    (warning,) = score_one(service, answer=answer, turns=2, parts={"sampling": "hot"})["warnings"]
    for part in (
        "sampling is hot",
        "scorer is f1",
        "answer of 4",
        "prompt of 3",
        "2 turns",
        "'stop'",
        "a tool call",
    ):
        assert part in warning


def test_a_calibration_by_api_key(tmp_path):
    key = hashlib.sha256(b"sk-1").hexdigest()
    names = {name: saved(tmp_path, name) for name in ("faq", "law")}
    service = service_with(calibrations=names, default_calibration="faq", calibration_by_key={key: "law"})
    context = RequestContext.of("chat", [(b"authorization", b"Bearer sk-1")], {})
    assert score_one(service, api_key_hash=context.api_key_hash)["calibration"].startswith("law@")
    assert score_one(service)["calibration"].startswith("faq@")


def test_the_scorer_is_asked_for_what_a_calibration_needs(tmp_path):
    model = LogisticScore(("log_semgrad",), (0.0,), (1.0,), (1.0,), 0.0)
    names = {"deep": saved(tmp_path, "deep", model=model), "faq": saved(tmp_path)}
    service = service_with(calibrations=names, default_calibration="faq", allow_semantic=False)
    score_one(service)
    found = score_one(service, options=RequestOptions(calibration="deep"))
    assert [options.semantic for options in service._client.asked] == [False, True]
    assert "the score lacks log_semgrad" in found["warnings"][0]


def test_prompts_that_are_too_long_for_the_exact_mode_are_scored_answer_only(tmp_path):
    service = service_with(max_exact_tokens=10)
    short, long = score_one(service, prompt=6), score_one(service, prompt=7)
    assert [found["mode"] for found in (short, long)] == ["exact", "answer_only"]
    assert short["warnings"] == []
    assert long["warnings"] == ["mode answer_only: prompt and answer have 11 tokens (max_exact_tokens=10)"]
    asked = score_one(service, prompt=7, options=RequestOptions(mode="answer_only"))
    assert asked["warnings"] == []  # what the client asked for is what it got


def given(service, body):
    async def go():
        transport = httpx.ASGITransport(Starlette(routes=routes(service)))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post("/v1/uncertainty", json=body)

    return asyncio.run(go())


def test_given_answers_get_a_decision_too(tmp_path):
    service = service_with(calibrations={"faq": saved(tmp_path)})
    ids = {"prompt_token_ids": [1, 2], "answer_token_ids": [3, 4]}
    assert given(service, ids).json()["decision"] == "answer"
    assert given(service, ids | {"uncertainty": {"calibration": "faq"}}).json()["decision"] == "answer"
    response = given(service, ids | {"uncertainty": {"calibration": "law"}})
    assert response.status_code == 400
    assert "uncertainty.calibration='law' is unknown; known: faq" in response.json()["error"]["message"]


def test_a_calibration_for_other_weights_is_said_once_in_the_log(tmp_path, caplog):
    service = service_with(calibrations={"faq": saved(tmp_path, fingerprint={"scorer": "f2", "mode": "exact"})})
    score_one(service, options=RequestOptions(mode="answer_only"))
    assert caplog.text == ""  # the request's own doing
    score_one(service)
    score_one(service)
    (record,) = caplog.records
    assert "is for the scorer f2, and this one is f1" in record.getMessage()
