"""The pass over whole (tiny) models, against plain autograd at batch 1."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from left_clean import tensors_kept_by, unchanged
from tiny_families import worst
from torch import Tensor, nn
from transformers import MistralConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from gnuq_serve.gradnorm import cover, gradient_pass, register, registry
from gnuq_serve.gradnorm.oracle import Oracle

Samples = list[tuple[list[int], list[int]]]

PAD = 5
SAMPLES: dict[str, tuple[list[int], list[int]]] = {
    "one token each": ([7], [8]),
    "one-token prompt": ([7], [8, 7, 7, 11]),
    "one-token answer": ([3, 9, 27, 3, 3, 60], [9]),
    "pad token in the prompt": ([1, PAD, 12, PAD, 40, 12, 13], [14, 2]),
    "pad token in the answer": ([50, 51, 52], [PAD, 53, PAD, 2]),
    "long": ([*range(20, 50), *range(40, 20, -1)], [33, 34, 35, 90, 91]),
}
MODELS = (
    "llama",
    "llama, tied",
    "llama with biases",
    "llama with biases, tied",
    "gpt2",
    "gpt2, tied",
    "mistral",
    "mistral, tied",
    "qwen2",
    "qwen2, tied",
)


@pytest.fixture(scope="module")
def build(tiny_model, tiny_llama, tiny_gpt2, llama_sizes) -> Callable[[str, torch.dtype], Any]:
    def make(name: str, dtype: torch.dtype) -> Any:
        family, tied = name.removesuffix(", tied"), name.endswith(", tied")
        match family:
            case "llama":
                return tiny_llama(tied, dtype=dtype)
            case "llama with biases":
                return tiny_llama(tied, attention_bias=True, dtype=dtype)
            case "gpt2":
                return tiny_gpt2(tied, dtype=dtype)
            case "mistral":
                # A window shorter than the long sample.
                config = MistralConfig(**llama_sizes, sliding_window=8, tie_word_embeddings=tied)
            case "qwen2":
                config = Qwen2Config(**llama_sizes, tie_word_embeddings=tied)
        return tiny_model(config, dtype)

    return make


def norms(model: nn.Module, samples: Samples) -> list[float]:
    return gradient_pass(model, cover(model), samples).grad_norm_sq.tolist()


def one_by_one(model: nn.Module, samples: Samples) -> list[float]:
    return [norms(model, [sample])[0] for sample in samples]


@pytest.mark.parametrize("name", MODELS)
class TestExactness:
    def test_float64(self, build, name):
        model = build(name, torch.float64)
        oracle = Oracle(model)
        samples = list(SAMPLES.values())
        expected = [oracle.score(*sample) for sample in samples]
        result = gradient_pass(model, cover(model), samples)
        assert result.grad_norm_sq.dtype == torch.float64
        assert worst(result.grad_norm_sq.tolist(), [norm for _, norm in expected]) <= 1e-9
        assert worst(one_by_one(model, samples), [norm for _, norm in expected]) <= 1e-9
        totals = [log_probabilities.sum().item() for log_probabilities in result.token_log_probabilities]
        assert worst(totals, [total for total, _ in expected]) <= 1e-9

    def test_float32(self, build, name):
        model = build(name, torch.float32)
        samples = list(SAMPLES.values())
        batch, single = norms(model, samples), one_by_one(model, samples)
        same, double = (
            [Oracle(model, dtype).score(*sample)[1] for sample in samples]
            for dtype in (torch.float32, torch.float64)
        )
        assert worst(batch, same) <= 5e-5
        assert worst(single, same) <= 5e-5
        assert worst(batch, double) <= 2e-4
        assert worst(single, double) <= 2e-4
        assert worst(batch, single) <= 2e-5
        assert worst(norms(model, samples[::-1])[::-1], batch) <= 2e-5


@pytest.mark.parametrize("name", ["llama with biases, tied", "gpt2"])
def test_bfloat16_is_near_float64(build, name):
    # The model's own arithmetic is coarse here; sums in bfloat16 on top would be far worse.
    model = build(name, torch.bfloat16)
    samples = list(SAMPLES.values())
    oracle = Oracle(model)
    assert worst(norms(model, samples), [oracle.score(*sample)[1] for sample in samples]) <= 0.1


def test_the_pad_token_counts(build):
    model = build("llama", torch.float64)
    assert model.get_input_embeddings().padding_idx == PAD
    sample = SAMPLES["pad token in the prompt"]
    dropping = Oracle(model)
    dropping.model.get_input_embeddings().padding_idx = PAD
    assert norms(model, [sample])[0] > dropping.score(*sample)[1] * (1 + 1e-4)


def test_log_probabilities_and_entropies_equal_a_naive_loop(build):
    model = build("gpt2, tied", torch.float64)
    samples = list(SAMPLES.values())
    result = gradient_pass(model, cover(model), samples)
    for b, (prompt, answer) in enumerate(samples):
        ids = list(prompt)
        log_probabilities, entropies = [], []
        for token in answer:
            with torch.no_grad():
                p = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1).tolist()
            log_probabilities.append(math.log(p[token]))
            entropies.append(-math.fsum(q * math.log(q) for q in p))
            ids.append(token)
        assert result.token_log_probabilities[b].tolist() == pytest.approx(log_probabilities, rel=1e-9)
        assert result.token_entropies[b].tolist() == pytest.approx(entropies, rel=1e-9)


class TestTheModelIsLeftAsItWas:
    @pytest.fixture
    def model(self, tiny_gpt2) -> Any:
        model = tiny_gpt2(tied=True, dtype=torch.float32)
        model.train()
        model.transformer.h[1].eval()
        model.transformer.wpe.weight.requires_grad_(False)
        return model

    def test_after_a_pass(self, model):
        with unchanged(model):
            norms(model, list(SAMPLES.values()))

    def test_after_an_error_in_the_forward_pass(self, model):
        with unchanged(model), pytest.raises(IndexError):
            norms(model, [([1, 1000], [2])])

    def test_after_an_error_in_a_rule(self, model, monkeypatch):
        def broken(layer: nn.Module, inputs: Any, delta: Tensor) -> Tensor:
            raise ArithmeticError("broken rule")

        monkeypatch.setattr(registry, "_rules", dict(registry._rules))
        register(nn.LayerNorm)(broken)
        with unchanged(model), pytest.raises(ArithmeticError, match="broken rule"):
            norms(model, list(SAMPLES.values()))

    def test_dropout_is_off(self, model):
        samples = list(SAMPLES.values())
        trained = norms(model, samples)
        assert trained == norms(model, samples)
        assert trained == norms(model.eval(), samples)

    def test_frozen_model_and_no_grad_caller(self, model):
        samples = list(SAMPLES.values())
        expected = norms(model, samples)
        model.requires_grad_(False)
        with torch.no_grad():
            assert norms(model, samples) == expected
            assert not torch.is_grad_enabled()

    def test_caller_in_inference_mode(self, model):
        expected = norms(model, [SAMPLES["long"]])
        with torch.inference_mode():
            assert norms(model, [SAMPLES["long"]]) == expected

    def test_gradients_of_the_users_own_training_are_kept(self, model):
        model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norms(model, list(SAMPLES.values()))
        after = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_after_an_interruption_on_the_way_down(self, model, monkeypatch):
        def interrupted(*_: Any) -> Tensor:
            raise KeyboardInterrupt

        monkeypatch.setattr(registry, "_rules", dict(registry._rules))
        register(nn.LayerNorm)(interrupted)
        with unchanged(model), pytest.raises(KeyboardInterrupt):
            gradient_pass(model, cover(model), list(SAMPLES.values()), semantic=True, recompute=1)


class TestNothingOfTheGraphIsKept:
    @pytest.mark.parametrize("tied", [False, True])
    def test_after_a_pass(self, tiny_llama, tied):
        model = tiny_llama(tied)
        coverage = cover(model)
        assert tensors_kept_by(lambda: gradient_pass(model, coverage, list(SAMPLES.values()))) == 0

    @pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
    def test_after_an_error(self, tiny_llama, monkeypatch, error):
        def broken(*_: Any) -> Tensor:
            raise error

        monkeypatch.setattr(registry, "_rules", dict(registry._rules))
        register(LlamaRMSNorm)(broken)
        model = tiny_llama(tied=True)
        coverage = cover(model)

        def fail() -> None:
            with contextlib.suppress(error):
                gradient_pass(model, coverage, list(SAMPLES.values()))

        assert tensors_kept_by(fail) == 0
