"""Samples laid out for one pass: padded ids, their positions, and where the answers are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Ids = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Batch:
    """B samples of at most T positions that the pass visits.

    Padding stands on the right and is masked by causality alone: no real position ever attends to the padding
    behind it, so its gradient is exactly zero.

    Attributes:
        ids: (B, T) token ids, 0 where padded.
        positions: (B, T) positions in the text.
        spans: for each sample, the visited positions that predict its answer tokens.
        prompts: for each sample, the visited positions that hold its prompt.
        targets: (N,) the answer tokens of all samples, one after the other.
    """

    ids: Tensor
    positions: Tensor
    spans: tuple[slice, ...]
    prompts: tuple[slice, ...]
    targets: Tensor

    @property
    def counts(self) -> list[int]:
        """Number of answer tokens of each sample."""
        return [span.stop - span.start for span in self.spans]

    @classmethod
    def of(cls, samples: Sequence[Ids], device: torch.device, skip: int = 0) -> Batch:
        """Lay out (prompt ids, answer ids) pairs, leaving out the first ``skip`` positions of each prompt."""
        # The last answer token is predicted, never read: it needs no position.
        sequences = [[*prompt, *answer][skip:-1] for prompt, answer in samples]
        length = max(map(len, sequences))
        ids = torch.zeros((len(samples), length), dtype=torch.long)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        visited = [len(prompt) - skip for prompt, _ in samples]
        answers = [len(answer) for _, answer in samples]
        return cls(
            ids=ids.to(device),
            positions=torch.arange(skip, skip + length, device=device).expand(len(samples), length),
            spans=tuple(slice(p - 1, p - 1 + a) for p, a in zip(visited, answers, strict=True)),
            prompts=tuple(slice(0, p) for p in visited),
            targets=torch.tensor([token for _, answer in samples for token in answer], device=device),
        )
