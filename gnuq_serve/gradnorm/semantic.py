"""SemGrad, ExGrad, ParaGrad and HybridGrad (arXiv:2605.04638), for answers of T tokens.

With the token entropies ``H_t`` held constant, ``L_H = (1/T) sum_t H_t (-log p_t)`` and
``L = (1/T) sum_t (-log p_t)``:

* SemGrad: mean absolute value of ``dL_H/dh`` at the prompt, over the upper half of the blocks;
* ExGrad: mean absolute value of the head's weight gradient of ``L``; ParaGrad: the same of ``L_H``;
* HybridGrad ``= a ParaGrad + (1 - a) SemGrad``, ``a = exp(-mean_t H_t)``.

A head tied to the embedding is counted as a head here: its own gradient, without the embedding's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gnuq_serve.gradnorm.layer_call import accumulation_dtype
from gnuq_serve.gradnorm.linear import TILE_BYTES

_CACHED_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class SemanticGradients:
    """The four, (B,) each; the two that need hidden states are None where the model shows no blocks."""

    exgrad: Tensor
    paragrad: Tensor
    semgrad: Tensor | None
    hybridgrad: Tensor | None

    @classmethod
    def of(cls, head: HeadGradients, semgrad: Tensor | None) -> SemanticGradients:
        """From what the head showed and the mean absolute gradient at hidden states, (B,)."""
        hybrid = None
        if semgrad is not None:
            alpha = torch.stack([h.mean().neg().exp() for h in head.entropies]).to(semgrad)
            hybrid = alpha * head.paragrad.to(semgrad) + (1 - alpha) * semgrad
        return cls(head.exgrad, head.paragrad, semgrad, hybrid)


class HeadGradients:
    """ExGrad and ParaGrad, from the head's inputs and the gradients of ``l = sum_t log p_t`` at its output.

    Attributes:
        entropies: ``H_t`` of each sample, (T_b,) each.
        weights: ``-H_t / T`` of all answer tokens, (N,): what turns the gradient of ``log p_t`` into its share of
            that of ``L_H``.
        exgrad, paragrad: (B,) each, once the head has been descended.
    """

    exgrad: Tensor
    paragrad: Tensor

    def __init__(self, entropies: Tensor, counts: Sequence[int]) -> None:
        self.entropies = entropies.split(list(counts))
        self.weights = torch.cat([-h / len(h) for h in self.entropies])
        self._counts = list(counts)

    def __call__(self, hidden: Tensor, delta: Tensor) -> None:
        """Take the head's inputs (N, d) and gradients (N, V)."""
        mean = torch.cat([torch.full_like(h, -1 / len(h)) for h in self.entropies])
        self.exgrad, self.paragrad = self._mean_absolute(hidden, delta, torch.stack([mean, self.weights]))

    def _mean_absolute(self, hidden: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
        """Of the head's weight gradient under each of K weightings (K, N) of the tokens: (K, B)."""
        dtype = accumulation_dtype(delta)
        kinds, width, vocabulary = len(weights), hidden.shape[1], delta.shape[1]
        weighted = hidden.to(dtype) * weights[:, :, None].to(hidden.device, dtype)
        # On a CPU a tile stays in the cache from the product to its sum.
        room = _CACHED_BYTES if delta.device.type == "cpu" else TILE_BYTES
        tile = max(1, room // (kinds * width * weighted.element_size()))
        totals = []
        for h, d in zip(weighted.split(self._counts, dim=1), delta.split(self._counts), strict=True):
            rows = h.mT.reshape(kinds * width, -1)
            parts = [(rows @ part.to(dtype)).abs_().view(kinds, -1).sum(1) for part in d.split(tile, dim=-1)]
            totals.append(torch.stack(parts).sum(0))
        return torch.stack(totals, dim=1) / (vocabulary * width)
