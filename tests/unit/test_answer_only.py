"""``answer_only``: the prompt's keys and values as constants, against autograd with the same constants."""

import pytest
import torch
from left_clean import tensors_kept_by, unchanged
from tiny_families import ANSWER, FAMILIES, PROMPT, SAMPLES, tiny, worst

from gnuq_serve.gradnorm import cover, gradient_pass
from gnuq_serve.gradnorm.oracle import Oracle
from gnuq_serve.gradnorm.prefix import PrefixCache

ONE_LENGTH = [
    (PROMPT, ANSWER),
    ([*range(30, 30 + len(PROMPT))], [40]),
    ([5, *PROMPT[1:]], [41, 5, 42, 42]),
    (PROMPT, [99]),
]


def answer_only(model, samples, **options):
    cache = PrefixCache(model, 2**20)
    prefixes = [cache.keys_and_values(prompt[:-1]) for prompt, _ in samples]
    return gradient_pass(model, cover(model), samples, prefixes=prefixes, **options)


@pytest.mark.parametrize("recompute", [0, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact(family, tied, recompute):
    model = tiny(family, tied=tied)
    result = answer_only(model, [(PROMPT, ANSWER)], recompute=recompute)
    total, norm_sq = Oracle(model).answer_only(PROMPT, ANSWER)
    assert worst(result.grad_norm_sq, [norm_sq]) <= 1e-9
    assert worst([result.token_log_probabilities[0].sum()], [total]) <= 1e-9


@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_prompts_of_one_length(family, recompute):
    model = tiny(family, tied=True)
    if cover(model).slow:
        pytest.skip("the slow path takes one sample at a time")
    oracle = Oracle(model)
    expected = [oracle.answer_only(*sample) for sample in ONE_LENGTH]
    result = answer_only(model, ONE_LENGTH, recompute=recompute)
    assert worst(result.grad_norm_sq, [norm_sq for _, norm_sq in expected]) <= 1e-9
    totals = [log_probabilities.sum() for log_probabilities in result.token_log_probabilities]
    assert worst(totals, [total for total, _ in expected]) <= 1e-9


@pytest.mark.parametrize("sample", SAMPLES)
def test_prompts_and_answers_of_one_token(sample):
    model = tiny("llama", tied=True)
    assert worst(answer_only(model, [sample]).grad_norm_sq, [Oracle(model).answer_only(*sample)[1]]) <= 1e-9


def test_prompt_of_one_token_is_exact_mode():
    model = tiny("gpt2")
    sample = ([7], [8, 7, 7, 11])
    assert (
        worst(
            answer_only(model, [sample]).grad_norm_sq, gradient_pass(model, cover(model), [sample]).grad_norm_sq
        )
        <= 1e-12
    )


def test_constants_make_a_difference():
    model = tiny("llama")
    oracle = Oracle(model)
    assert oracle.answer_only(PROMPT, ANSWER)[1] < 0.9 * oracle.score(PROMPT, ANSWER)[1]
    assert oracle.answer_only(PROMPT, ANSWER)[0] == pytest.approx(oracle.score(PROMPT, ANSWER)[0], rel=1e-12)


@pytest.mark.parametrize(("family", "projection"), [("falcon", "query_key_value"), ("mpt", "Wqkv")])
def test_families_with_attention_of_their_own(family, projection):
    # Nothing stands between this layer and the attention that has parameters.
    model = tiny(family, tied=True)
    oracle = Oracle(model)
    constant = len(PROMPT) - 1
    for name, layer in oracle.model.named_modules():
        if name.endswith(projection):
            layer.register_forward_hook(
                lambda _layer, _args, output: torch.cat(
                    [output[:, :constant].detach(), output[:, constant:]], dim=1
                )
            )
    expected = oracle.score(PROMPT, ANSWER)[1]
    result = answer_only(model, [(PROMPT, ANSWER)])
    assert worst(result.grad_norm_sq, [expected]) <= (1e-6 if family == "mpt" else 1e-9)  # MPT: float32 softmax
    assert worst(result.grad_norm_sq, gradient_pass(model, cover(model), [(PROMPT, ANSWER)]).grad_norm_sq) > 0.05


def test_the_oracle_refuses_attention_out_of_its_reach():
    with pytest.raises(RuntimeError, match="MptForCausalLM does not take its attention from"):
        Oracle(tiny("mpt")).answer_only(PROMPT, ANSWER)


def test_no_gradients_at_the_prompt():
    result = answer_only(tiny("llama"), [(PROMPT, ANSWER)], semantic=True)
    assert (result.input_grad_norm_sq, result.hidden_grad, result.semantic) == (None, None, None)


def test_float32():
    model = tiny("gemma3_text", tied=True, dtype=torch.float32)
    result = answer_only(model, [(PROMPT, ANSWER)])
    assert worst(result.grad_norm_sq, [Oracle(model, torch.float32).answer_only(PROMPT, ANSWER)[1]]) <= 5e-5
    assert worst(result.grad_norm_sq, [Oracle(model).answer_only(PROMPT, ANSWER)[1]]) <= 2e-4


@pytest.mark.parametrize("recompute", [0, 3])
def test_nothing_is_left_behind(recompute):
    model = tiny("llama", tied=True).train()
    with unchanged(model):
        assert tensors_kept_by(lambda: answer_only(model, ONE_LENGTH, recompute=recompute)) == 0
