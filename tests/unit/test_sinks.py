"""Attention sinks: the rule from a softmax written out, and gpt-oss's whole layers."""

import dataclasses

import pytest
import torch
from models.architectures import ARCHITECTURES
from transformers import AttentionInterface

from gnuq_serve.gradnorm import UnsupportedModelError, cover, gradient_pass
from gnuq_serve.gradnorm.layer_call import LayerCall, SharedInput
from gnuq_serve.gradnorm.oracle import Oracle
from gnuq_serve.gradnorm.sinks import sinks

SAMPLES = [([3, 4, 5, 5, 9], [7, 8, 9]), ([3, 4, 20], [3, 4, 20, 21, 22, 5]), ([11], [5])]


@pytest.fixture
def gpt_oss():
    return ARCHITECTURES["gpt-oss"].build(tied=False)


def weights(logits: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Causal attention weights, (B, heads, T, S), with a sink for each head."""
    tokens, keys = logits.shape[-2:]
    future = torch.ones(tokens, keys, dtype=torch.bool).triu(keys - tokens + 1)
    column = sink[None, :, None, None].expand(*logits.shape[:3], 1)
    return torch.cat([logits.masked_fill(future, -torch.inf), column], -1).softmax(-1)[..., :-1]


@pytest.mark.parametrize("keys", [5, 8])  # 8: three keys come from a cache
def test_against_autograd(keys):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, keys, dtype=torch.float64)
    delta = torch.randn_like(logits)
    sink = torch.randn(3, dtype=torch.float64, requires_grad=True)
    expected = []
    for b in range(2):
        (gradient,) = torch.autograd.grad((weights(logits[b : b + 1], sink) * delta[b]).sum(), sink)
        expected.append(gradient.square().sum())
    call = LayerCall(SharedInput(torch.zeros(2, 5, 7)), output=weights(logits, sink).detach())
    torch.testing.assert_close(sinks(None, call, delta), torch.stack(expected), rtol=1e-12, atol=0)


def test_share_of_each_layer(gpt_oss):
    coverage = cover(gpt_oss)
    shares: dict[str, torch.Tensor] = {}

    def noting(name, rule):
        def function(layer, call, delta):
            shares[name] = rule.function(layer, call, delta)
            return shares[name]

        return dataclasses.replace(rule, function=function)

    rules = tuple((n, m, noting(n, r) if r.name == "sinks" else r) for n, m, r in coverage.rules)
    gradient_pass(gpt_oss, dataclasses.replace(coverage, rules=rules), SAMPLES)

    oracle = Oracle(gpt_oss)
    named = {name: p for name, p in oracle.model.named_parameters() if name.endswith("sinks")}
    assert sorted(named) == sorted(f"{name}.sinks" for name in shares)
    for b, (prompt, answer) in enumerate(SAMPLES):
        ids = torch.tensor([[*prompt, *answer]])
        log_p = oracle.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total = log_p.gather(-1, torch.tensor(answer)[:, None]).sum()
        for name, gradient in zip(named, torch.autograd.grad(total, list(named.values())), strict=True):
            expected = gradient.square().sum()
            assert expected > 0
            actual = shares[name.removesuffix(".sinks")][b]
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


def test_attention_without_weights_is_refused(gpt_oss):
    gpt_oss.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.self_attn: .*'flex_attention'.*\"eager\""):
        cover(gpt_oss)


def test_attention_that_lost_its_weights_is_noticed(gpt_oss):
    def attention(module, query, key, value, *args, **kwargs):
        return query.transpose(1, 2), None

    coverage = cover(gpt_oss)
    AttentionInterface.register("without_weights", attention)
    try:
        gpt_oss.config._attn_implementation = "without_weights"
        with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn did not return what its rule \(sinks\)"):
            gradient_pass(gpt_oss, coverage, SAMPLES)
    finally:
        AttentionInterface._global_mapping.pop("without_weights")
