"""The real scorer process on the weights of an engine, here a small one that fuses and pads them."""

import pytest
import torch
from fused_engine import SharingEngine
from live_scorer import Running, wait_until
from starlette.applications import Starlette
from starlette.testclient import TestClient

from gnuq_serve.scorer import Sample, Scorer
from gnuq_serve.service.answer import Answer
from gnuq_serve.service.routes import routes
from gnuq_serve.service.scorer.loading import load_scorer
from gnuq_serve.service.served import ServedModel, scorer_config
from gnuq_serve.service.settings.model import load_settings
from gnuq_serve.weights.checkpoint import CheckpointError
from gnuq_serve.weights.checkpoint_source import CheckpointSource
from gnuq_serve.weights.source import SourceRefused

pytestmark = pytest.mark.usefixtures("own_temp_folder")

PROMPT, ANSWER = [5, 3, 9, 40], [7, 8, 9]


@pytest.fixture(scope="module")
def checkpoints(tiny_llama, tmp_path_factory):
    """Two models of the same shape, and where they are."""
    models = []
    for seed in (0, 1):
        model = tiny_llama(tied=True, dtype=torch.float32, seed=seed, vocab_size=97)
        path = tmp_path_factory.mktemp("models") / str(seed)
        model.save_pretrained(path)
        models.append((model, str(path)))
    return models


class Engine(SharingEngine):
    """Serves one checkpoint, shares its weights, and can be given others."""

    def __init__(self, model, path, **probe):
        super().__init__(model.config, tensors_of(model), **probe)
        self.path = path

    @property
    def served(self):
        return ServedModel(model=self.path, dtype="float32", shared=self.json)

    def reload(self, model, *, whole=True):
        super().reload(tensors_of(model), whole=whole)


def tensors_of(model):
    return [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]


def expected_of(model):
    (score,) = Scorer.from_model(model).score([Sample(PROMPT, ANSWER)])
    return score


def probe_of(model):
    ids = tuple(PROMPT)
    (score,) = Scorer.from_model(model).score([Sample(ids[:1], ids[1:])])
    return {"probe_ids": ids, "probe_log_probability": score.log_probability}


def run(served):
    return Running(served, scorer_weights="shared", deadline_seconds=90)


def same(score, expected):
    assert score.status == "scored", score.reason
    assert score.log_probability == pytest.approx(expected.log_probability, rel=1e-6)
    assert score.log_grad_norm_sq == pytest.approx(expected.log_grad_norm_sq, rel=1e-6)
    assert score.fingerprint == expected.fingerprint


def test_scores_follow_the_engines_weights(checkpoints):
    (first, path), (second, _) = checkpoints
    engine = Engine(first, path, **probe_of(first))
    running = run(engine.served)
    try:
        (score,) = running.score(Answer(PROMPT, ANSWER))
        same(score, expected_of(first))
        assert running.service.state.weights == "shared"
        engine.reload(second)
        (score,) = running.score(Answer(PROMPT, ANSWER))
        same(score, expected_of(second))
        engine.reload(first, whole=False)
        (score,) = running.score(Answer(PROMPT, ANSWER))
        assert (score.status, score.reason) == (
            "failed",
            "the engine's weights are being changed, or a change of them failed half-way",
        )
        engine.file.end_change()
        (score,) = running.score(Answer(PROMPT, ANSWER))
        same(score, expected_of(first))
        # A scorer that starts only now compares with neither the checkpoint nor the probe of the first weights.
        engine.reload(second)
        running.process.kill()
        wait_until(lambda: running.service.state.status != "ready", 30)
        (score,) = running.score(Answer(PROMPT, ANSWER))
        same(score, expected_of(second))
    finally:
        running.stop()


def refusal(served):
    """As the process reports it."""
    settings = load_settings().model_copy(update={"scorer_weights": "shared"})
    with pytest.raises(SourceRefused) as refused:
        load_scorer(scorer_config(settings, served))
    return str(refused.value)


def test_an_engine_that_computes_something_else_is_refused(checkpoints):
    (first, path), _ = checkpoints
    probe = probe_of(first)
    probe["probe_log_probability"] -= 0.5
    assert "they don't compute the same" in refusal(Engine(first, path, **probe).served)


def test_another_checkpoint_than_the_served_one_is_refused(checkpoints):
    (first, _), (_, other) = checkpoints
    assert "differs between the engine and the checkpoint" in refusal(Engine(first, other).served)


@pytest.mark.parametrize(
    ("why", "reason"),
    [("experts are repacked", "experts are repacked"), (None, "only vLLM's own server, with our plugin in it")],
)
def test_weights_that_are_not_shared_are_not_replaced_by_a_copy(checkpoints, why, reason):
    (_, path), _ = checkpoints
    assert reason in refusal(ServedModel(model=path, dtype="float32", shared_refused=why))


def auto(served):
    return load_scorer(scorer_config(load_settings(), served))


def test_auto_reads_the_engines_weights_where_they_are_shared(checkpoints):
    (first, path), _ = checkpoints
    engine = Engine(first, path, **probe_of(first))
    scorer, source, not_shared = auto(engine.served)
    assert (source.name, not_shared) == ("shared", None)
    same(scorer.score([Sample(PROMPT, ANSWER)])[0], expected_of(first))


def test_auto_loads_a_copy_of_what_it_can_not_share(checkpoints):
    (first, path), (second, other) = checkpoints
    wrong = probe_of(first)
    wrong["probe_log_probability"] -= 0.5
    for served, reason, expected in (
        (Engine(first, path, **wrong).served, "they don't compute the same", first),
        (Engine(first, other).served, "differs between the engine and the checkpoint", second),
        (ServedModel(model=path, dtype="float32", shared_refused="experts"), "experts", first),
    ):
        scorer, source, not_shared = auto(served)
        assert source.name == "checkpoint"
        assert reason in not_shared
        same(scorer.score([Sample(PROMPT, ANSWER)])[0], expected_of(expected))


def test_the_health_route_says_why_auto_loaded_a_copy(checkpoints, capfd):
    (first, path), _ = checkpoints
    running = Running(ServedModel(model=path, dtype="float32", shared_refused="experts"), deadline_seconds=90)
    try:
        (score,) = running.score(Answer(PROMPT, ANSWER))
        same(score, expected_of(first))
        with TestClient(Starlette(routes=routes(running.service))) as client:
            health = client.get("/v1/uncertainty/health").json()
        assert (health["status"], health["weights"], health["not_shared"]) == ("ready", "checkpoint", "experts")
    finally:
        running.stop()
    assert "can't have the engine's: experts" in capfd.readouterr().err


def test_without_room_for_a_copy_the_remedy_is_named(checkpoints, monkeypatch):
    (_, path), _ = checkpoints

    def load(self):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(CheckpointSource, "load", load)
    with pytest.raises(CheckpointError, match=r"--gnuq-scorer-weights checkpoint.*experts"):
        auto(ServedModel(model=path, dtype="float32", shared_refused="experts"))


def test_a_scorer_meant_for_another_device_is_refused(checkpoints):
    (first, path), _ = checkpoints
    engine = Engine(first, path)
    for device in ("auto", "cpu"):
        config = scorer_config(load_settings().model_copy(update={"scorer_device": device}), engine.served)
        assert load_scorer(config).source.name == "shared"
