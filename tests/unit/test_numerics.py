"""Coarse dtypes, certainty and overflow: near float32, and every number finite or None."""

import math
from typing import Any

import pytest
import torch
from tiny_families import ANSWER, FAMILIES, PROMPT, SAMPLES, tiny, worst

from gnuq_serve import Sample, Scorer
from gnuq_serve.gradnorm import cover, gradient_pass
from gnuq_serve.gradnorm.oracle import Oracle
from gnuq_serve.gradnorm.trace import token_grad_norms

HALVES = [torch.bfloat16, torch.float16]


def log_norms(model: Any, **options: Any) -> list[float]:
    coverage = cover(model)
    return [gradient_pass(model, coverage, [s], **options).grad_norm_sq[0].log().item() for s in SAMPLES]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_near_float32(family, dtype):
    half, single = (log_norms(tiny(family, tied=True, dtype=d)) for d in (dtype, torch.float32))
    furthest = max(abs(a - b) for a, b in zip(half, single, strict=True))
    print(f"log_grad_norm_sq, {family}, {dtype}: {furthest:.4f} from float32")
    assert furthest <= 0.1


@pytest.mark.parametrize("dtype", HALVES)
def test_our_sums_add_nothing_to_the_models_own_coarseness(dtype):
    # The oracle in the model's dtype shares its activations' rounding; ours must not be further from the truth.
    model = tiny("llama", tied=True, dtype=dtype)
    ours = log_norms(model)
    truth = [math.log(Oracle(model).score(*sample)[1]) for sample in SAMPLES]
    assert max(abs(a - b) for a, b in zip(ours, truth, strict=True)) <= (
        0.03 if dtype == torch.bfloat16 else 0.005
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_trace_in_half_precision(dtype):
    half, single = (tiny("llama", tied=True, dtype=d) for d in (dtype, torch.float32))
    logs = [token_grad_norms(m, cover(m), (PROMPT, ANSWER)).log() for m in (half, single)]
    assert (logs[0] - logs[1]).abs().max() <= 0.1


def certain(dtype: torch.dtype, gap: float) -> tuple[Any, list[tuple[list[int], list[int]]]]:
    """A model with sharpened logits, and prompts with the answer that it is surest of."""
    model = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(gap)
        prompts = torch.tensor([[i, j, 3] for i in range(1, 100, 9) for j in range(1, 100, 9)])
        log_p = model(input_ids=prompts).logits[:, -1].log_softmax(-1)
    surest = log_p.amax(-1).argsort(descending=True)[:3].tolist()
    return model.to(dtype), [(prompts[i].tolist(), [int(log_p[i].argmax())]) for i in surest]


class TestCertainAnswers:
    def test_float32_has_all_digits(self):
        # 1 - p is about 1e-8: less than float32 can tell from nothing.
        model, samples = certain(torch.float32, gap=18)
        expected = [Oracle(model).score(*sample) for sample in samples]
        assert all(-1e-6 < log_p < -1e-10 for log_p, _ in expected)
        result = gradient_pass(model, cover(model), samples)
        assert worst(result.grad_norm_sq, [norm_sq for _, norm_sq in expected]) <= 1e-4
        assert worst(torch.cat(result.token_log_probabilities), [log_p for log_p, _ in expected]) <= 1e-4

    @pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
    @pytest.mark.parametrize("gap", [18, 80, 1000])
    def test_finite_or_none(self, dtype, gap):
        model, samples = certain(dtype, gap)
        for uncertainty in scored(model, samples):
            assert uncertainty["status"] == "scored"
            assert odd_numbers(uncertainty) == []


class TestOverflow:
    @pytest.mark.parametrize("weight", [6e4, -6e4, math.inf])
    @pytest.mark.parametrize("dtype", HALVES)
    def test_of_logits(self, dtype, weight):
        model = tiny("llama", dtype=dtype)
        with torch.no_grad():
            model.lm_head.weight[ANSWER[1]] = weight
        for uncertainty in scored(model, SAMPLES):
            assert odd_numbers(uncertainty) == []

    def test_is_said(self):
        model = tiny("llama", dtype=torch.float16)
        with torch.no_grad():
            model.lm_head.weight.mul_(1e5)
        (uncertainty,) = scored(model, SAMPLES[:1])
        assert uncertainty["status"] == "failed"
        assert "not finite" in uncertainty["reason"]

    @pytest.mark.parametrize("dtype", HALVES)
    def test_of_activations(self, dtype):
        model = tiny("llama", dtype=dtype)
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight.mul_(1e6 if dtype == torch.float16 else 1e38)
        for uncertainty in scored(model, SAMPLES):
            assert odd_numbers(uncertainty) == []

    def test_of_one_sample_leaves_the_others_of_its_batch(self):
        model = tiny("llama", dtype=torch.float32)
        alone = scored(model, SAMPLES[1:2])[0]["log_grad_norm_sq"]
        with torch.no_grad():
            model.model.embed_tokens.weight[99] = math.inf
        broken, fine = scored(model, [([7], [99, 3]), SAMPLES[1]])
        assert broken["status"] == "failed"
        assert odd_numbers(broken) == []
        assert fine["log_grad_norm_sq"] == pytest.approx(alone, rel=1e-5)


def scored(model: Any, samples: list[tuple[list[int], list[int]]]) -> list[dict[str, Any]]:
    results = Scorer.from_model(model).score([Sample(*sample) for sample in samples], trace=True, semantic=True)
    return [result.to_dict() for result in results]


def odd_numbers(value: Any, path: str = "") -> list[str]:
    """Where a result holds a number that is not finite."""
    if isinstance(value, dict):
        return [odd for key, item in value.items() for odd in odd_numbers(item, f"{path}.{key}")]
    if isinstance(value, list | tuple):
        return [odd for i, item in enumerate(value) for odd in odd_numbers(item, f"{path}[{i}]")]
    return [f"{path} = {value}"] if isinstance(value, float) and not math.isfinite(value) else []
