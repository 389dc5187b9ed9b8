"""``log p_t`` and entropies against log-softmax and autograd in float64."""

import math

import pytest
import torch
from torch import Tensor

from gnuq_serve.gradnorm import token_probability
from gnuq_serve.gradnorm.token_probability import token_log_probabilities

VOCABULARY = 11


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(6, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3


TARGETS = torch.tensor([0, 3, 10, 3, 7, 1])
WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0, 1.0], dtype=torch.float64)


def by_autograd(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.double().detach().requires_grad_()
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(-1, TARGETS[:, None])[:, 0]
    entropies = torch.special.entr(log_p.exp()).sum(-1)
    (delta,) = torch.autograd.grad((chosen * WEIGHTS).sum(), logits)
    return chosen.detach(), entropies.detach(), delta


def by_us(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    chosen, entropies = token_log_probabilities(logits, TARGETS)
    assert not entropies.requires_grad
    (delta,) = torch.autograd.grad((chosen * WEIGHTS.to(chosen)).sum(), logits)
    return chosen.detach(), entropies, delta


@pytest.mark.parametrize("rows", [1, 4, 5, 6, 100])
def test_exact_in_tiles_of_any_size(logits, rows, monkeypatch):
    monkeypatch.setattr(token_probability, "TILE_BYTES", 4 * VOCABULARY * rows)
    for actual, expected in zip(by_us(logits), by_autograd(logits), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)]
)
def test_sums_are_float32_at_least(logits, dtype, tolerance):
    logits = logits.to(dtype)
    chosen, entropies, delta = by_us(logits)
    assert (chosen.dtype, entropies.dtype, delta.dtype) == (torch.float32, torch.float32, dtype)
    expected = by_autograd(logits)
    torch.testing.assert_close(chosen.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropies.double(), expected[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(delta.double(), expected[2], rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("gap", [0.0, 3.0, 10.0, 18.0, 30.0])
def test_the_last_digits_where_p_is_almost_one(logits, gap):
    # 1 - p is 6e-8 or nothing in float32: what is left for the others has all its digits.
    logits = logits.float() / 10
    logits[torch.arange(6), TARGETS] = gap
    chosen, entropies, delta = by_us(logits)
    for i, row in enumerate(logits.double().tolist()):
        others = math.fsum(math.exp(x - gap) for v, x in enumerate(row) if v != TARGETS[i])
        log_p = -math.log1p(others)
        p = [math.exp(x - gap + log_p) for x in row]
        rest = others / (1 + others)
        expected = [-q * WEIGHTS[i].item() for q in p]
        expected[TARGETS[i]] = rest * WEIGHTS[i].item()
        assert delta[i].tolist() == pytest.approx(expected, rel=1e-5)
        assert chosen[i].item() == pytest.approx(log_p, rel=1e-5)
        terms = [q * (gap - x - log_p) for v, (q, x) in enumerate(zip(p, row, strict=True)) if v != TARGETS[i]]
        assert entropies[i].item() == pytest.approx(math.fsum(terms) - p[TARGETS[i]] * log_p, rel=1e-5)


def test_logits_of_minus_infinity(logits):
    masked = logits.clone()
    masked[:, [2, 5, 6]] = -math.inf
    chosen, entropies, delta = by_us(masked)
    expected = by_autograd(masked.masked_fill(masked.isinf(), -1e4))
    torch.testing.assert_close((chosen, entropies, delta), expected, rtol=1e-12, atol=1e-14)


def test_a_token_that_cannot_be(logits):
    masked = logits.clone()
    masked[torch.arange(6), TARGETS] = -math.inf
    chosen, entropies, _ = by_us(masked)
    assert chosen.tolist() == [-math.inf] * 6
    torch.testing.assert_close(entropies, by_autograd(masked.masked_fill(masked.isinf(), -1e4))[1])


def test_a_certain_token(logits):
    alone = torch.full_like(logits, -math.inf)
    alone[torch.arange(6), TARGETS] = 2.0
    chosen, entropies, delta = by_us(alone)
    assert chosen.tolist() == entropies.tolist() == [0.0] * 6
    assert torch.equal(delta, torch.zeros_like(delta))


def test_logits_are_left_as_they_are(logits):
    before = logits.clone()
    by_us(logits)
    assert torch.equal(logits, before)
