"""The trace against a backward pass for each token."""

import pytest
import torch
from left_clean import tensors_kept_by, unchanged
from tiny_families import ANSWER, FAMILIES, PROMPT, SAMPLES, tiny, worst

from gnuq_serve.gradnorm import cover
from gnuq_serve.gradnorm.oracle import Oracle
from gnuq_serve.gradnorm.prefix import PrefixCache
from gnuq_serve.gradnorm.trace import token_grad_norms


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact(family, tied):
    model = tiny(family, tied=tied)
    norms = token_grad_norms(model, cover(model), (PROMPT, ANSWER), group=4, at_once=3)
    assert norms.dtype == torch.float64
    assert norms.shape == (len(ANSWER),)
    assert worst(norms, Oracle(model).token_grad_norms(PROMPT, ANSWER)) <= 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_with_constant_prompt(family):
    model = tiny(family, tied=True)
    prefixes = [PrefixCache(model, 2**20).keys_and_values(PROMPT[:-1])]
    norms = token_grad_norms(model, cover(model), (PROMPT, ANSWER), prefixes=prefixes, group=4, at_once=3)
    assert worst(norms, Oracle(model).answer_only_tokens(PROMPT, ANSWER)) <= 1e-9


@pytest.fixture(scope="module")
def llama():
    return tiny("llama", tied=True)


@pytest.fixture(scope="module")
def llama_norms(llama):
    oracle = Oracle(llama)
    return [oracle.token_grad_norms(*sample) for sample in SAMPLES]


@pytest.mark.parametrize("recompute", [0, 2, 3])
@pytest.mark.parametrize(("group", "at_once"), [(1, 1), (2, 8), (3, 2), (7, 7), (16, 1), (16, 8)])
def test_any_grouping_gives_the_same(llama, llama_norms, group, at_once, recompute):
    coverage = cover(llama)
    for sample, expected in zip(SAMPLES[::2], llama_norms[::2], strict=True):
        norms = token_grad_norms(llama, coverage, sample, group=group, at_once=at_once, recompute=recompute)
        assert worst(norms, expected) <= 1e-9


def test_float32():
    model = tiny("gpt2", tied=True, dtype=torch.float32)
    norms = token_grad_norms(model, cover(model), (PROMPT, ANSWER))
    assert worst(norms, Oracle(model, torch.float32).token_grad_norms(PROMPT, ANSWER)) <= 5e-5
    assert worst(norms, Oracle(model).token_grad_norms(PROMPT, ANSWER)) <= 2e-4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_nothing_is_left_behind(family):
    model = tiny(family, tied=True).train()
    coverage = cover(model)
    with unchanged(model):
        kept = tensors_kept_by(lambda: token_grad_norms(model, coverage, (PROMPT, ANSWER), group=3, at_once=2))
    assert kept == 0


def test_inference_mode_and_no_grad_of_the_caller():
    model = tiny("llama").requires_grad_(False)
    coverage = cover(model)
    expected = token_grad_norms(model, coverage, (PROMPT, ANSWER)).tolist()
    with torch.inference_mode():
        assert token_grad_norms(model, coverage, (PROMPT, ANSWER)).tolist() == expected
    with torch.no_grad():
        assert token_grad_norms(model, coverage, (PROMPT, ANSWER)).tolist() == expected
