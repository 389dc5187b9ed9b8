"""Samples of unequal length as one batch of ids and targets, for rivals that want rectangles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gnuq_serve import Sample

NO_TARGET = -100


@dataclass(frozen=True, slots=True)
class Padded:
    """A batch, padded on the right: with causal attention no token sees the padding behind it.

    Attributes:
        ids: (B, L) what the model reads; the last answer token is predicted, never read.
        targets: (B, K) the token to predict at each of the last K positions, ``NO_TARGET`` outside the answer.
    """

    ids: Tensor
    targets: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Padded:
        """Samples, in their order."""
        length = max(sample.length for sample in samples)
        first = min(len(sample.prompt_ids) for sample in samples) - 1
        ids = torch.zeros((len(samples), length), dtype=torch.long)
        targets = torch.full((len(samples), length), NO_TARGET)
        for row, sample in enumerate(samples):
            ids[row, : sample.length] = torch.tensor([*sample.prompt_ids, *sample.answer_ids][:-1])
            targets[row, len(sample.prompt_ids) - 1 : sample.length] = torch.tensor(sample.answer_ids)
        return cls(ids, targets[:, first:].contiguous())


def negative_log_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """``-l`` summed over all rows; logits (..., K, V), targets (..., K)."""
    flat = logits.flatten(0, -2)
    return nn.functional.cross_entropy(flat, targets.flatten(), ignore_index=NO_TARGET, reduction="sum")


def by_length(samples: Sequence[Sample], size: int) -> list[list[int]]:
    """Indices in chunks of samples of similar length, at most ``size`` in each."""
    order = sorted(range(len(samples)), key=lambda i: samples[i].length)
    return [order[start : start + size] for start in range(0, len(order), size)]
