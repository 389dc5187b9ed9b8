"""Two plain ways to ``||grad_theta p_t||^2`` of each answer token: a pass each; one graph and a backward each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gnuq_serve import Sample
from rivals.naive_loop import sum_of_squares, trainable


class PassPerToken:
    """A forward and a backward pass for each token.

    ``prefix_only=False`` reads the whole sample each time; ``True`` reads no further than the token asks for.
    """

    def __init__(self, model: nn.Module, *, prefix_only: bool = False) -> None:
        self.model = model
        self.prefix_only = prefix_only

    def __call__(self, sample: Sample, tokens: Sequence[int]) -> list[float]:
        """``||grad p_t||^2`` of the answer tokens with these indices."""
        norms = []
        with trainable(self.model):
            for t in tokens:
                read = len(sample.prompt_ids) + t if self.prefix_only else sample.length
                _probability(sample, t, _logits(self.model, sample, read)).backward()
                norms.append(sum_of_squares(self.model))
        return norms


class KeptGraph:
    """One forward pass, its graph kept, and a backward pass for each token."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, sample: Sample, tokens: Sequence[int]) -> list[float]:
        """``||grad p_t||^2`` of the answer tokens with these indices."""
        norms = []
        with trainable(self.model):
            logits = _logits(self.model, sample, sample.length)
            for t in tokens:
                _probability(sample, t, logits).backward(retain_graph=True)
                norms.append(sum_of_squares(self.model))
        return norms


def _logits(model: nn.Module, sample: Sample, read: int) -> Tensor:
    ids = torch.tensor([[*sample.prompt_ids, *sample.answer_ids][:read]])
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


def _probability(sample: Sample, t: int, logits: Tensor) -> Tensor:
    # In float64: float32 loses digits of 1 - p where p is nearly one, and with them those of the gradient.
    return logits[len(sample.prompt_ids) - 1 + t].double().softmax(-1)[sample.answer_ids[t]]
