"""What the real scorer process answers, with tiny models: each its own score, equal to the one in process."""

import asyncio
import os
import stat

import pytest
from live_scorer import SAMPLES, START_SECONDS, VOCABULARY, Running, close_to

from gnuq_serve.scorer import Sample, Scorer
from gnuq_serve.service.answer import Answer
from gnuq_serve.service.requests.request_plan import RequestOptions
from gnuq_serve.service.scorer.client import ScorerClient
from gnuq_serve.service.scorer.messages import ScorerConfig
from gnuq_serve.service.served import ServedModel
from gnuq_serve.uncertainty import Uncertainty

pytestmark = pytest.mark.usefixtures("own_temp_folder")


def test_state(running, model_path, in_process):
    state = running.service.state
    assert (state.status, state.reason) == ("ready", None)
    assert (state.model, state.dtype, state.device) == (model_path, "float32", "cpu")
    assert state.fingerprint == in_process.fingerprint


def test_scores_equal_those_in_process(running, in_process):
    results = running.score(*(Answer(prompt, answer) for prompt, answer in SAMPLES))
    for result, (prompt, answer) in zip(results, SAMPLES, strict=True):
        (expected,) = in_process.score([Sample(prompt, answer)])
        close_to(expected)(result)
        assert result.warnings == ()
        assert result.seconds > 0
    assert len({result.id for result in results}) == len(SAMPLES)
    assert all(result.id.startswith("unc-") for result in results)


def test_concurrent_requests_get_each_its_own(running, in_process):
    expected = [in_process.score([Sample(*sample)])[0] for sample in SAMPLES]
    futures = [
        running.ask(running.service.score([Answer(*SAMPLES[i % 4]), Answer(*SAMPLES[(i + 1) % 4])]))
        for i in range(24)
    ]
    for i, future in enumerate(futures):
        first, second = map(Uncertainty.from_dict, future.result(START_SECONDS))
        close_to(expected[i % 4])(first)
        close_to(expected[(i + 1) % 4])(second)


def test_more_answers_at_once_than_one_batch_takes(running, in_process):
    results = running.score(*(Answer(*SAMPLES[0]) for _ in range(150)))
    (expected,) = in_process.score([Sample(*SAMPLES[0])])
    assert len(results) == 150
    for result in results:
        close_to(expected)(result)


def test_one_bad_answer_fails_alone(running):
    good = Answer(*SAMPLES[0])
    outside, empty, too_long = (
        Answer([1], [VOCABULARY]),
        Answer([1], []),
        Answer([1] * 60, [2] * 5),
    )
    results = running.score(good, outside, None, empty, too_long, good)
    assert [r.status for r in results] == ["scored", "failed", "skipped", "failed", "failed", "scored"]
    assert f"answer_ids holds {VOCABULARY}, outside the scorer's vocabulary of {VOCABULARY}" in results[1].reason
    assert "token ids" in results[2].reason
    assert "answer_ids is empty" in results[3].reason
    assert "context of 64" in results[4].reason


def test_the_engines_log_probability_is_checked(running):
    (plain,) = running.score(Answer(*SAMPLES[0]))
    half = plain.log_probability / 2
    (same,) = running.score(Answer(*SAMPLES[0], [half, half + 1e-4]))
    (other,) = running.score(Answer(*SAMPLES[0], [half, half + 1]))
    assert same.warnings == ()
    assert len(other.warnings) == 1
    assert "differs from the engine's" in other.warnings[0]


def test_only_this_user_reaches_it(running):
    folder = running.folder.stat()
    assert stat.S_IMODE(folder.st_mode) == 0o700
    assert folder.st_uid == os.getuid()
    kinds = {path.suffix: stat.S_ISSOCK(path.stat().st_mode) for path in running.folder.iterdir()}
    assert kinds == {".sock": True, ".json": False}
    assert running.process.net_connections("inet") == []


def test_client_alone(model_path):
    async def go():
        client = ScorerClient(ScorerConfig(endpoint="", model=model_path, served_model=model_path, device="cpu"))
        client.start()
        try:
            return await client.score(*SAMPLES[1], START_SECONDS)
        finally:
            await client.stop()

    result = asyncio.run(go())
    assert (result.status, result.tokens) == ("scored", 1)


def test_too_long_an_answer_is_skipped(model_path):
    running = Running(ServedModel(model=model_path, dtype="float32"), max_score_tokens=6)
    try:
        long, short = Answer([1] * 5, [2, 3]), Answer([1] * 4, [2, 3])
        skipped, scored = running.score(long, short)
        assert (skipped.status, skipped.reason) == (
            "skipped",
            "prompt and answer have 7 tokens (max_score_tokens=6)",
        )
        assert scored.status == "scored"
    finally:
        running.stop()


def test_thinking_and_answer_are_scored_apart(running, in_process):
    prompt, thinking, answer = [1, 5, 9], [7, 3, 4], [8, 2]
    whole = Answer(prompt, thinking + answer, thinking=3)
    (plain,) = running.call(running.service.score([whole]))
    assert "thinking" not in plain
    (both,) = running.call(running.service.score([whole], RequestOptions(thinking=True)))
    headline, thought = Uncertainty.from_dict(both), Uncertainty.from_dict(both["thinking"])
    expected_answer, expected_thinking = in_process.score(
        [Sample(prompt + thinking, answer), Sample(prompt, thinking)]
    )
    close_to(expected_answer)(headline)
    close_to(expected_answer)(Uncertainty.from_dict(plain))
    close_to(expected_thinking.replace(span="thinking"))(thought)
    (unfinished,) = running.call(
        running.service.score([Answer(prompt, thinking, thinking=3)], RequestOptions(thinking=True))
    )
    assert (unfinished["status"], unfinished["thinking"]["status"]) == ("skipped", "scored")
    (none,) = running.call(running.service.score([Answer(prompt, answer)], RequestOptions(thinking=True)))
    assert (none["status"], none["thinking"]) == ("scored", None)


def test_a_forced_answer_is_scored_with_a_warning(running):
    (result,) = running.score(Answer(*SAMPLES[0], grammar=True))
    assert result.status == "scored"
    assert len(result.warnings) == 1
    assert "grammar" in result.warnings[0]


def test_an_adapters_answer_is_scored_with_the_adapter(running, model_path, in_process, tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    adapted = Scorer.from_model(model.eval())
    prompt, answer = SAMPLES[0]
    with_it, without, nowhere = running.score(
        Answer(prompt, answer, adapter=str(tmp_path)),
        Answer(prompt, answer),
        Answer(prompt, answer, adapter="/no"),
    )
    (expected,), (plain,) = (one.score([Sample(prompt, answer)]) for one in (adapted, in_process))
    close_to(expected.replace(fingerprint=with_it.fingerprint))(with_it)
    close_to(plain)(without)
    assert with_it.fingerprint != without.fingerprint
    assert nowhere.status == "skipped"
    assert nowhere.reason.startswith("adapter not loaded: ")


def test_options_reach_the_scorer(running, in_process):
    prompt, answer = SAMPLES[2]
    given = Answer(prompt, answer)
    (plain,), (asked,) = running.score(given), running.score(given, trace=True, semantic=True)
    (expected,) = in_process.score([Sample(prompt, answer)], trace=True, semantic=True)
    assert plain.trace is None
    assert plain.signals.semgrad is None
    assert asked.trace.epistemic == pytest.approx(expected.trace.epistemic, rel=1e-5)
    for name in ("semgrad", "exgrad", "paragrad", "hybridgrad", "log_hidden_grad"):
        assert getattr(asked.signals, name) == pytest.approx(getattr(expected.signals, name), rel=1e-5), name
    (only,) = running.score(given, mode="answer_only")
    (expected_only,) = in_process.score([Sample(prompt, answer)], mode="answer_only")
    close_to(expected_only)(only)
    assert only.fingerprint != plain.fingerprint


def test_what_the_operator_does_not_allow_is_left_out_with_a_warning(running, monkeypatch):
    prompt, answer = SAMPLES[2]
    settings = running.service.settings.model_copy(update={"max_trace_tokens": 2, "allow_semantic": False})
    monkeypatch.setattr(running.service, "settings", settings)
    (result,) = running.score(Answer(prompt, answer), trace=True, semantic=True)
    assert result.status == "scored"
    assert result.trace is None
    assert result.signals.semgrad is None
    assert result.warnings == (
        "no trace: the answer has 5 tokens (max_trace_tokens=2)",
        "no semantic signals: not allowed here (allow_semantic=false)",
    )
