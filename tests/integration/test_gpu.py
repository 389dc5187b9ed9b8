"""The pass on GPUs, beside the pass on the CPU; skipped where there are none."""

import copy

import pytest
import torch

from gnuq_serve import Sample, Scorer

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SAMPLES = [
    Sample([3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5]),
    Sample([6, 2, 7, 1, 8, 2, 8, 1], [8, 2, 8, 4, 5]),
    Sample([1], [4, 1, 4, 2]),
    Sample([5, 7, 7, 2], [1]),
]
OPTIONS = [{"trace": True, "semantic": True}, {"mode": "answer_only", "trace": True}]


def assert_equal(found, expected, tolerance):
    for gpu, cpu in zip(found, expected, strict=True):
        assert gpu.status == cpu.status == "scored"
        assert gpu.log_probability == pytest.approx(cpu.log_probability, rel=tolerance)
        assert gpu.log_grad_norm_sq == pytest.approx(cpu.log_grad_norm_sq, abs=tolerance)
        assert gpu.trace.epistemic == pytest.approx(cpu.trace.epistemic, rel=10 * tolerance)
        for name in ("log_input_grad_norm_sq", "log_hidden_grad", "semgrad", "exgrad", "paragrad", "hybridgrad"):
            value, other = getattr(gpu.signals, name), getattr(cpu.signals, name)
            assert (value is None) == (other is None)
            assert value is None or value == pytest.approx(other, rel=10 * tolerance)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_same_numbers_as_on_the_cpu(tiny_llama, dtype, tolerance, tied, options):
    model = tiny_llama(tied=tied).to(dtype)
    expected = Scorer.from_model(model).score(SAMPLES, **options)
    scorer = Scorer.from_model(model.to(DEVICE))
    assert torch.device(scorer.device).type == DEVICE
    assert_equal(scorer.score(SAMPLES, **options), expected, tolerance)


@pytest.mark.slow
def test_bfloat16_is_near_float32_on_the_cpu(smollm2):
    samples = [Sample(list(range(500, 540)), list(range(700, 700 + n))) for n in (1, 8, 24)]
    expected = Scorer.from_pretrained(str(smollm2), dtype="float32", device="cpu").score(samples)
    found = Scorer.from_pretrained(str(smollm2), dtype="bfloat16", device=DEVICE).score(samples)
    for gpu, cpu in zip(found, expected, strict=True):
        assert gpu.log_grad_norm_sq == pytest.approx(cpu.log_grad_norm_sq, abs=0.1)


def many(count):
    return [Sample([(7 * i + j) % 101 for j in range(300)], [i % 101, 5, 6]) for i in range(count)]


@pytest.fixture
def larger(tiny_llama):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    return tiny_llama(dtype=torch.float32, max_position_embeddings=512, **sizes).to(DEVICE)


def test_batches_stay_in_the_budget(larger):
    scorer = Scorer(larger, memory_budget="200MiB")
    scorer.score(many(1))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = scorer.score(many(40))
    assert all(result.status == "scored" for result in results)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * 200 * 2**20


def test_a_batch_is_split_where_memory_runs_out(larger):
    expected = Scorer(larger, memory_budget="100MiB").score(many(40))
    scorer = Scorer(larger, memory_budget="1000GiB", max_batch_tokens=10**9)
    scorer.score(many(1))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 400 * 2**20) / total)
    try:
        results = scorer.score(many(40))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for result, other in zip(results, expected, strict=True):
        assert result.log_grad_norm_sq == pytest.approx(other.log_grad_norm_sq, abs=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("budget", ["1GiB", 1000])
def test_model_split_over_two_gpus(tiny_llama, options, budget):
    import accelerate

    model = tiny_llama(tied=False)
    expected = Scorer.from_model(copy.deepcopy(model)).score(SAMPLES, **options)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    accelerate.dispatch_model(model, places | {"model.layers.1": 1, "model.norm": 1, "lm_head": 1})
    assert_equal(Scorer.from_model(model, memory_budget=budget).score(SAMPLES, **options), expected, 1e-9)
