"""Real weights: SmolLM2-135M-Instruct against plain autograd."""

import dataclasses
import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from gnuq_serve import Sample
from gnuq_serve.gradnorm import Coverage, cover, gradient_pass
from gnuq_serve.gradnorm.oracle import Oracle
from gnuq_serve.gradnorm.prefix import PrefixCache
from gnuq_serve.gradnorm.trace import token_grad_norms
from gnuq_serve.weights import load_checkpoint

pytestmark = pytest.mark.slow

END_OF_TURN = 2  # <|im_end|>, SmolLM2's pad token too
DIALOGUES: list[tuple[list[dict[str, str]], str]] = [
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of France?"}], "Paris"),
    ([{"role": "user", "content": "What is 2 + 2?"}], "2 + 2 equals 4.<|im_end|>"),
    (
        [
            {"role": "system", "content": "Answer in one sentence."},
            {"role": "user", "content": "Name a colour, a colour, any colour."},
            {"role": "assistant", "content": "Blue."},
            {"role": "user", "content": "Why is the sky that colour?"},
        ],
        "The sky is blue because air scatters blue light more than red light.<|im_end|>",
    ),
]


@pytest.fixture(scope="module")
def samples(smollm2: Path) -> list[Sample]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    made = []
    for messages, answer in DIALOGUES:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        made.append(
            Sample(
                tokenizer(prompt, add_special_tokens=False).input_ids,
                tokenizer(answer, add_special_tokens=False).input_ids,
            )
        )
    return made


@pytest.fixture(scope="module")
def model64(smollm2: Path) -> Iterator[Any]:
    yield load_checkpoint(str(smollm2), dtype="float64", device="cpu")
    gc.collect()


@pytest.fixture(scope="module")
def model32(smollm2: Path) -> Iterator[Any]:
    yield load_checkpoint(str(smollm2), dtype="float32", device="cpu")
    gc.collect()


@pytest.fixture(scope="module")
def oracle(model64: Any) -> Oracle:
    return Oracle(model64)


@pytest.fixture(scope="module")
def scores64(oracle: Oracle, samples: list[Sample]) -> list[tuple[float, float]]:
    return [oracle.score(s.prompt_ids, s.answer_ids) for s in samples]


@pytest.fixture(scope="module")
def trace64(oracle: Oracle, samples: list[Sample]) -> list[float]:
    return oracle.token_grad_norms(samples[1].prompt_ids, samples[1].answer_ids)


def run(model: Any, coverage: Coverage, samples: list[Sample]) -> tuple[list[float], list[float]]:
    result = gradient_pass(model, coverage, [(s.prompt_ids, s.answer_ids) for s in samples])
    totals = [log_probabilities.double().sum().item() for log_probabilities in result.token_log_probabilities]
    return totals, result.grad_norm_sq.tolist()


def run_one_by_one(model: Any, coverage: Coverage, samples: list[Sample]) -> tuple[list[float], list[float]]:
    runs = [run(model, coverage, [sample]) for sample in samples]
    return [totals[0] for totals, _ in runs], [norms[0] for _, norms in runs]


def worst(label: str, actual: list[float], expected: list[float]) -> float:
    error = max(abs(a / e - 1) for a, e in zip(actual, expected, strict=True))
    print(f"{label}: {error:.1e}")
    return error


def test_samples_are_what_the_test_is_about(samples):
    assert all(END_OF_TURN in sample.prompt_ids for sample in samples)
    assert len(samples[0].answer_ids) <= 2
    assert len({sample.length for sample in samples}) == len(samples)


def test_float64(model64, samples, scores64):
    assert model64.get_input_embeddings().padding_idx == END_OF_TURN
    coverage = cover(model64)
    assert coverage.tied
    expected_totals, expected = map(list, zip(*scores64, strict=True))
    totals, batch = run(model64, coverage, samples)
    _, single = run_one_by_one(model64, coverage, samples)
    assert worst("log-probability, float64", totals, expected_totals) <= 1e-9
    assert worst("batch, float64", batch, expected) <= 1e-9
    assert worst("single, float64", single, expected) <= 1e-9


def test_trace(model64, model32, samples, trace64):
    ids = (samples[1].prompt_ids, samples[1].answer_ids)
    norms = token_grad_norms(model64, cover(model64), ids, group=4, at_once=3)
    assert worst("trace, float64", norms.tolist(), trace64) <= 1e-9
    # Not autograd in float32: it takes 1 - p from a p of almost one, which costs that token's norm 1e-3.
    norms = token_grad_norms(model32, cover(model32), ids)
    assert worst("trace, float32 against float64", norms.tolist(), trace64) <= 2e-4


def test_answer_only_float64(model64, samples, oracle):
    ids = (samples[2].prompt_ids, samples[2].answer_ids)
    total, norm_sq = oracle.answer_only(*ids)
    prefixes = PrefixCache(model64, 2**30)
    result = gradient_pass(model64, cover(model64), [ids], prefixes=[prefixes.keys_and_values(ids[0][:-1])])
    assert worst("answer only, float64", result.grad_norm_sq.tolist(), [norm_sq]) <= 1e-9
    assert result.token_log_probabilities[0].sum().item() == pytest.approx(total, rel=1e-9)


def test_gradients_at_the_prompt_float64(model64, samples, oracle):
    ids = (samples[2].prompt_ids, samples[2].answer_ids)
    result = gradient_pass(model64, cover(model64), [ids], semantic=True, recompute=10)
    expected = dataclasses.asdict(oracle.semantic(*ids))
    expected["input"], expected["hidden"] = oracle.hidden_gradients(*ids)
    assert result.semantic is not None
    actual = {name: getattr(result.semantic, name) for name in dataclasses.asdict(result.semantic)}
    actual |= {"input": result.input_grad_norm_sq, "hidden": result.hidden_grad}
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert worst(f"{name}, float64", actual[name].tolist(), [value]) <= 1e-9


def test_float32(model32, samples, scores64):
    coverage = cover(model32)
    _, batch = run(model32, coverage, samples)
    _, single = run_one_by_one(model32, coverage, samples)
    oracle = Oracle(model32, torch.float32)
    same = [oracle.score(s.prompt_ids, s.answer_ids)[1] for s in samples]
    double = [norm for _, norm in scores64]
    assert worst("batch, float32 against float32", batch, same) <= 5e-5
    assert worst("single, float32 against float32", single, same) <= 5e-5
    assert worst("batch, float32 against float64", batch, double) <= 2e-4
    assert worst("single, float32 against float64", single, double) <= 2e-4
    assert worst("batch against single, float32", batch, single) <= 2e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_near_float64_as_autograd_is(smollm2, samples, scores64, dtype):
    """How near that is depends on the CPU's kernels, so plain autograd in the same dtype is the measure."""
    model = load_checkpoint(str(smollm2), dtype=dtype, device="cpu")
    _, batch = run(model, cover(model), samples)
    plain = Oracle(model, getattr(torch, dtype))
    plain_batch = [plain.score(s.prompt_ids, s.answer_ids)[1] for s in samples]
    ours, autograd = (
        max(abs(math.log(a / e)) for a, (_, e) in zip(norms, scores64, strict=True))
        for norms in (batch, plain_batch)
    )
    print(f"log_grad_norm_sq, {dtype} against float64: {ours:.4f}; plain autograd: {autograd:.4f}")
    assert ours <= max(0.02, 3 * autograd)  # either is one draw of rounding errors
