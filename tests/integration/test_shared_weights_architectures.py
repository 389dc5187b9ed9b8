"""vLLM loads tiny models of many architectures, and transformers' model is built on its tensors."""

import pytest
import torch

pytest.importorskip("vllm")

from models.vllm_families import FAMILIES, REFUSED, save_tiny
from shared_weights import InProcess, examine

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@pytest.fixture(scope="module")
def vllm():
    return InProcess()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_tensors_and_logits_are_the_checkpoints(name, vllm, tmp_path):
    finding = examine(name, tmp_path, vllm)
    assert finding.refused is None
    assert finding.tensors > 10
    assert (finding.unequal, finding.logit_difference, finding.added_bytes) == (0, 0.0, 0)


@pytest.mark.parametrize("name", REFUSED)
def test_experts_that_vllm_repacks_are_refused(name, vllm, tmp_path):
    refused = examine(name, tmp_path, vllm).refused
    assert "experts" in refused
    assert "repacked" in refused


def test_a_worker_tells_of_changes_and_scores(vllm, tmp_path):
    """The worker extension on a loaded model: what another process maps, what a reload does, what it scores."""
    import msgspec

    from gnuq_serve.scorer import Sample, Scorer
    from gnuq_serve.vllm.worker_extension import GnuqWorkerExtension
    from gnuq_serve.weights.layout import SharedWeights
    from gnuq_serve.weights.shared import SharedSource
    from gnuq_serve.weights.source import SourceRefused

    first = save_tiny("Llama", tmp_path / "first")
    other = save_tiny("Llama", tmp_path / "other", seed=1)
    engine, config = vllm.load(str(first))
    seen = []

    class Worker(GnuqWorkerExtension):
        vllm_config, model_config = config, config.model_config

        class model_runner:  # noqa: N801
            get_model = staticmethod(lambda: engine)

        def reload_weights(self, path):
            seen.append(source.version())
            vllm.reload(engine, config, path)

        def update_weights(self):
            raise RuntimeError("half-way")

        def finish_weight_update(self):
            pass

    worker = Worker()
    shared = msgspec.json.decode(worker.gnuq_share_weights()["weights"], type=SharedWeights)
    source = SharedSource(shared, str(first), dtype="float32")
    scorer = Scorer.from_model(source.load())
    sample = Sample([3, 4, 5], [6, 7])
    by_checkpoint = {path: Scorer.from_pretrained(str(path)) for path in (first, other)}

    def check(path):
        (expected,) = by_checkpoint[path].score([sample])
        (found,) = scorer.score([sample])
        (here,) = worker.gnuq_score([(sample.prompt_ids, sample.answer_ids)], {"mode": "exact"})
        for name in ("log_probability", "log_grad_norm_sq", "fingerprint"):
            assert getattr(found, name) == getattr(expected, name), name
        assert (here["log_probability"], here["log_grad_norm_sq"]) == (
            expected.log_probability,
            expected.log_grad_norm_sq,
        )

    check(first)
    assert source.version() == 0
    worker.reload_weights(str(other))
    assert (seen, source.version()) == ([None], 2)
    scorer.weights_changed()
    check(other)
    with pytest.raises(RuntimeError, match="half-way"):
        worker.update_weights()
    assert source.version() is None
    worker.finish_weight_update()
    assert source.version() == 4
    with torch.no_grad():  # engine and checkpoint no longer agree
        next(engine.parameters()).add_(1)
    again = SharedSource(shared, str(first), dtype="float32")
    again.load()  # the engine has been given other weights, so nothing is compared
    again.version = lambda: 0
    with pytest.raises(SourceRefused, match="differs between the engine and the checkpoint"):
        again.load()
