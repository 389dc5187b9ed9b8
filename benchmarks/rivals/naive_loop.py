"""What one writes first: forward and backward for each sample, then the sum of squares of every ``.grad``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from gnuq_serve import Sample


class NaiveLoop:
    """One sample at a time, logits at all positions."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """``||grad_theta l||^2`` of each sample."""
        with trainable(self.model):
            return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float:
        ids = torch.tensor([[*sample.prompt_ids, *sample.answer_ids]])
        logits = self.model(input_ids=ids, use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1]
        log_probabilities = logits.log_softmax(-1).gather(-1, ids[0, len(sample.prompt_ids) :, None])
        log_probabilities.sum().backward()
        return sum_of_squares(self.model)


def sum_of_squares(model: nn.Module) -> float:
    """``sum ||p.grad||^2`` over the parameters; their gradients are dropped."""
    total = sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    return total


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """Every parameter requires a gradient inside, and none has one left over outside."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    model.requires_grad_(True)
    try:
        yield
    finally:
        model.zero_grad()
        for parameter in frozen:
            parameter.requires_grad_(False)
