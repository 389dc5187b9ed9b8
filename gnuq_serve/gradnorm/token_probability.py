"""``log p_t`` and entropy of each answer token, from logits, without a second copy of them.

A log-softmax would be kept for the backward pass beside the logits that it was made from; with a vocabulary of
50,000 to 260,000 that copy is most of a short pass's memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gnuq_serve.gradnorm.layer_call import accumulation_dtype
from gnuq_serve.gradnorm.linear import TILE_BYTES


def token_log_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """``log p_t`` (with a gradient) and entropies in nats (without), both (N,), from logits (N, V)."""
    chosen, entropies = _TokenLogProbability.apply(logits, targets)
    return chosen, entropies


class _TokenLogProbability(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        chosen, entropies = [], []
        for rows, ids in _tiles(logits, targets):
            log_p = _below_its_maximum(rows)
            log_p -= log_p.exp().sum(-1, keepdim=True).log()
            own = log_p.gather(-1, ids[:, None])[:, 0]
            others = log_p.exp().scatter_(-1, ids[:, None], 0)
            # Where p is almost one, log p and its share of the entropy are right by what is left for the others.
            own = torch.where(own > -0.5, torch.log1p(-others.sum(-1)), own)
            chosen.append(own)
            share = own.exp() * own.clamp_min(torch.finfo(own.dtype).min)  # 0 where p is 0
            # A token that is ruled out has log p = -inf and adds nothing.
            log_p.clamp_(min=torch.finfo(log_p.dtype).min)
            entropies.append(-torch.linalg.vecdot(others, log_p) - share)
            del log_p, others  # before the next tile's
        ctx.save_for_backward(logits, targets)
        all_entropies = torch.cat(entropies)
        ctx.mark_non_differentiable(all_entropies)
        return torch.cat(chosen), all_entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """``d log p_t / d logits = onehot - p``."""
        logits, targets = ctx.saved_tensors
        delta = torch.empty_like(logits)
        start = 0
        for rows, ids in _tiles(logits, targets):
            probabilities = _below_its_maximum(rows).exp_()
            probabilities.div_(probabilities.sum(-1, keepdim=True))
            # 1 - p as the sum of all others: exact where p is almost one.
            probabilities.scatter_(-1, ids[:, None], 0)
            rest = probabilities.sum(-1, keepdim=True)
            part = probabilities.neg_().scatter_(-1, ids[:, None], rest)
            stop = start + len(ids)
            delta[start:stop] = part.mul_(grads[0][start:stop, None])
            start = stop
        return delta, None


def _below_its_maximum(rows: Tensor) -> Tensor:
    # Not torch's own softmax: over a large vocabulary its float32 kernels for CPUs sum in one long chain, and
    # what is left for the other tokens comes out 4e-6 too large (measured, 49,152 tokens). `sum` adds pairwise.
    logits = rows.to(accumulation_dtype(rows))
    return logits - logits.amax(-1, keepdim=True)


def _tiles(logits: Tensor, targets: Tensor) -> zip[tuple[Tensor, Tensor]]:
    size = max(1, TILE_BYTES // (4 * logits.shape[-1]))
    return zip(logits.split(size), targets.to(logits.device).split(size), strict=True)
