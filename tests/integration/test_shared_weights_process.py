"""The real scorer process on the weights of an engine, here a small one that fuses and pads them."""

import msgspec
import pytest
import torch
from fused_engine import FusedEngine
from test_scorer_process import Running, own_temp_folder, wait_until  # noqa: F401  (a fixture)

from gnuq_serve.scorer import Sample, Scorer
from gnuq_serve.service.answer import Answer
from gnuq_serve.service.scorer.loading import load_scorer
from gnuq_serve.service.served import ServedModel, scorer_config
from gnuq_serve.service.settings.model import load_settings
from gnuq_serve.weights.layout import SharedWeights
from gnuq_serve.weights.sharing import share
from gnuq_serve.weights.source import SourceRefused
from gnuq_serve.weights.tracing import CopyRecorder

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


class Engine:
    """Serves one checkpoint, shares its weights, and can be given others."""

    def __init__(self, model, path, **probe):
        self.engine, self.path = FusedEngine(model.config), path
        recorder = CopyRecorder()
        with recorder:
            self.engine.load_weights(recorder.watched(tensors_of(model)))
        layout, storages = recorder.layout(self.engine.tensors())
        self.file, layout = share(self.engine, layout, storages)
        self.weights = SharedWeights(self.file.path, layout, **probe)

    @property
    def served(self):
        weights = msgspec.json.encode(self.weights).decode()
        return ServedModel(model=self.path, dtype="float32", shared=weights)

    def reload(self, model, *, whole=True):
        self.file.begin_change()
        self.engine.load_weights(tensors_of(model))
        if whole:
            self.file.end_change()


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
