"""Real weights: SmolLM2-135M-Instruct against plain autograd."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from gnuq_serve import Sample
from gnuq_serve.gradnorm import Coverage, cover, gradient_pass
from gnuq_serve.gradnorm.oracle import Oracle
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
def oracle64(smollm2: Path, samples: list[Sample]) -> list[tuple[float, float]]:
    return oracle_scores(load_checkpoint(str(smollm2), dtype="float64", device="cpu"), torch.float64, samples)


def oracle_scores(model: Any, dtype: torch.dtype, samples: list[Sample]) -> list[tuple[float, float]]:
    oracle = Oracle(model, dtype)
    scores = [oracle.score(s.prompt_ids, s.answer_ids) for s in samples]
    del oracle
    gc.collect()
    return scores


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


def test_float64(smollm2, samples, oracle64):
    model = load_checkpoint(str(smollm2), dtype="float64", device="cpu")
    assert model.get_input_embeddings().padding_idx == END_OF_TURN
    coverage = cover(model)
    assert coverage.tied
    expected_totals, expected = map(list, zip(*oracle64, strict=True))
    totals, batch = run(model, coverage, samples)
    _, single = run_one_by_one(model, coverage, samples)
    assert worst("log-probability, float64", totals, expected_totals) <= 1e-9
    assert worst("batch, float64", batch, expected) <= 1e-9
    assert worst("single, float64", single, expected) <= 1e-9


def test_float32(smollm2, samples, oracle64):
    model = load_checkpoint(str(smollm2), dtype="float32", device="cpu")
    coverage = cover(model)
    _, batch = run(model, coverage, samples)
    _, single = run_one_by_one(model, coverage, samples)
    same = [norm for _, norm in oracle_scores(model, torch.float32, samples)]
    double = [norm for _, norm in oracle64]
    assert worst("batch, float32 against float32", batch, same) <= 5e-5
    assert worst("single, float32 against float32", single, same) <= 5e-5
    assert worst("batch, float32 against float64", batch, double) <= 2e-4
    assert worst("single, float32 against float64", single, double) <= 2e-4
    assert worst("batch against single, float32", batch, single) <= 2e-5
