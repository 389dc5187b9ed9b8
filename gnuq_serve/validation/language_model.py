"""Other covariances on a causal language model: the diagonal Fisher information of all its parameters.

``g^T Cov g`` with ``g`` the gradient of an answer's log-probability and ``Cov = (F / mean(F) + lambda)^-1``: the
larger lambda, the nearer to the isotropic estimate; the overall scale does not touch an AUROC. F comes from
inputs alone (labels are drawn from the model, as the Fisher information asks), of three sources:

* ``own``: texts that the model itself writes, in place of its training data, which nobody has;
* ``questions``: questions and answers of the evaluation that are not scored here;
* ``random``: tokens drawn at random.

A full covariance of a language model is out of reach; K-FAC, which has no factors for embeddings, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SOURCES = ("own", "questions", "random")
DAMPINGS = (1.0, 0.01)
TEXT_TOKENS = 64
_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Item:
    """An answer: token ids of the prompt and of the answer, and whether it is right."""

    key: str
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    correct: bool


def own_texts(
    model: nn.Module, start: int, count: int, *, length: int = TEXT_TOKENS, seed: int = 0
) -> list[list[int]]:
    """Texts of ``length`` tokens that the model writes after the token ``start``, at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    texts: list[list[int]] = []
    while len(texts) < count:
        ids = torch.full((min(_AT_ONCE, count - len(texts)), 1), start)
        past: Any = None
        with torch.inference_mode():
            for _ in range(length - 1):
                out = model(ids[:, -1:], past_key_values=past, use_cache=True)
                past = out.past_key_values
                chances = out.logits[:, -1].float().softmax(-1)
                ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
        texts += ids.tolist()
    return texts


def random_texts(vocabulary: int, count: int, *, length: int = TEXT_TOKENS, seed: int = 0) -> list[list[int]]:
    """Texts of uniformly drawn tokens."""
    drawn = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    return [list(row) for row in drawn.tolist()]


def fisher_diagonal(model: nn.Module, texts: Iterator[Sequence[int]], *, seed: int = 0) -> list[Tensor]:
    """Diagonal of the Fisher information of next tokens, a mean over texts, shaped as the parameters.

    For each text the squared gradient of ``sum_t log p(y_t | x_<t)``, every ``y_t`` drawn from the model: an
    unbiased estimate of ``sum_t E[(d log p(y_t))^2]``, since independent scores have mean zero.
    """
    generator = torch.Generator().manual_seed(seed)
    total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in model.parameters()]
    count = 0
    for text in texts:
        logs = _log_softmax(model, torch.tensor([list(text)]))
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        for sum_, gradient in zip(total, _gradient(model, logs.gather(-1, drawn).sum()), strict=True):
            sum_ += gradient.float().square()
        count += 1
    for sum_ in total:
        sum_ /= count
    return total


class Covariances:
    """Named inverse-Fisher covariances, and ``log g^T Cov g`` under each of them."""

    def __init__(self, fishers: dict[str, list[Tensor]]) -> None:
        self._fishers = fishers
        self._means = {
            name: sum(part.double().sum().item() for part in parts) / sum(part.numel() for part in parts)
            for name, parts in fishers.items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        """``isotropic``, then ``SOURCE:LAMBDA``."""
        return ("isotropic", *(f"{name}:{damping:g}" for name in self._fishers for damping in DAMPINGS))

    def log_norms(self, model: nn.Module, item: Item) -> tuple[float, dict[str, float]]:
        """The answer's log-probability, and ``log g^T Cov g`` by name."""
        logs = _log_softmax(model, torch.tensor([[*item.prompt_ids, *item.answer_ids][:-1]]))
        answer = torch.tensor(list(item.answer_ids))[:, None]
        log_p = logs[-len(answer) :].gather(-1, answer).sum()
        sums = dict.fromkeys(self.names, 0.0)
        for at, gradient in enumerate(_gradient(model, log_p)):
            square = gradient.float().square()
            sums["isotropic"] += square.sum(dtype=torch.float64).item()
            for name, parts in self._fishers.items():
                relative = parts[at] / self._means[name]
                for damping in DAMPINGS:
                    weighted = square / (relative + damping)
                    sums[f"{name}:{damping:g}"] += weighted.sum(dtype=torch.float64).item()
        return log_p.item(), {name: math.log(value) for name, value in sums.items()}


def uncertainties(log_p: float, tokens: int, log_norm: float) -> dict[str, float]:
    """What a covariance's ``log g^T Cov g`` becomes: by itself, for S, and for the normalised P (logarithms)."""
    return {
        "log_norm": log_norm,
        "epistemic": 2 * log_p + log_norm,
        "normalized_epistemic": 2 * log_p / tokens - 2 * math.log(tokens) + log_norm,
    }


def _log_softmax(model: nn.Module, ids: Tensor) -> Tensor:
    """``log p`` of every next token, (T, V)."""
    with torch.enable_grad():
        logs: Tensor = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
    return logs


def _gradient(model: nn.Module, value: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, list(model.parameters()))
