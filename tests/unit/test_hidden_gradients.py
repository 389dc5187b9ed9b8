"""Gradients at the prompt's input embeddings and hidden states, against autograd."""

import dataclasses

import pytest
import torch
from tiny_families import ANSWER, FAMILIES, PROMPT, SAMPLES, tiny, worst

from gnuq_serve.gradnorm import PassResult, cover, gradient_pass
from gnuq_serve.gradnorm.oracle import Oracle


def passed(model, samples, **options) -> PassResult:
    return gradient_pass(model, cover(model), samples, **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact(family, tied):
    model = tiny(family, tied=tied)
    result = passed(model, [(PROMPT, ANSWER)])
    input_norm_sq, hidden = Oracle(model).hidden_gradients(PROMPT, ANSWER)
    assert worst(result.input_grad_norm_sq, [input_norm_sq]) <= 1e-9
    assert worst(result.hidden_grad, [hidden]) <= 1e-9


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return tiny(request.param, tied=True)


@pytest.mark.parametrize("recompute", [0, 2, 3])
@pytest.mark.parametrize("position", [None, -1, -3])
def test_batches_and_positions(model, position, recompute):
    samples = [sample for sample in SAMPLES if position is None or len(sample[0]) >= -position]
    oracle = Oracle(model)
    expected = [oracle.hidden_gradients(*sample, position) for sample in samples]
    result = passed(model, samples, position=position, recompute=recompute)
    assert worst(result.input_grad_norm_sq, [norm_sq for norm_sq, _ in expected]) <= 1e-9
    assert worst(result.hidden_grad, [norm for _, norm in expected]) <= 1e-9


def test_a_prompt_shorter_than_the_position_gives_its_first_token(model):
    expected = Oracle(model).hidden_gradients([50, 51, 52], ANSWER, position=0)[1]
    assert worst(passed(model, [([50, 51, 52], ANSWER)], position=-4).hidden_grad, [expected]) <= 1e-9


def test_positions_differ(model):
    at = {p: passed(model, [(PROMPT, ANSWER)], position=p).hidden_grad.item() for p in (None, -1, -4)}
    assert len({round(value, 9) for value in at.values()}) == 3


def test_the_semantic_pass_leaves_them_as_they_are(model):
    plain, semantic = (passed(model, SAMPLES, semantic=flag) for flag in (False, True))
    assert worst(semantic.input_grad_norm_sq, plain.input_grad_norm_sq) <= 1e-12
    assert worst(semantic.hidden_grad, plain.hidden_grad) <= 1e-12
    assert worst(semantic.grad_norm_sq, plain.grad_norm_sq) <= 1e-12


def test_a_model_that_shows_no_blocks_has_none(model):
    coverage = dataclasses.replace(cover(model), blocks=())
    result = gradient_pass(model, coverage, [(PROMPT, ANSWER)], semantic=True)
    assert result.hidden_grad is None
    assert (result.semantic.semgrad, result.semantic.hybridgrad) == (None, None)
    assert worst(result.input_grad_norm_sq, [Oracle(model).hidden_gradients(PROMPT, ANSWER)[0]]) <= 1e-9


def test_sums_of_bfloat16_gradients_are_float32(model):
    result = passed(tiny("llama", dtype=torch.bfloat16), [(PROMPT, ANSWER)])
    assert result.input_grad_norm_sq.dtype == result.hidden_grad.dtype == torch.float32
