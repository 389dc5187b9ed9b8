"""The oracle: plain autograd, one sample at a time, every parameter's gradient in full.

Slow and large on purpose; it is what the rules are compared with.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn


class Oracle:
    """A copy of a model in a dtype of its own, differentiated by ``backward()``."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        self.model = copy.deepcopy(model).to(dtype).eval().requires_grad_(True)
        for module in self.model.modules():
            if isinstance(module, nn.Embedding):
                module.padding_idx = None  # autograd drops that row's gradient; the derivative is not zero

    def score(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> tuple[float, float]:
        """``(l, ||grad_theta l||^2)`` of one answer, natural logarithm."""
        self.model.zero_grad(set_to_none=True)
        device = next(self.model.parameters()).device
        ids = torch.tensor([[*prompt_ids, *answer_ids]], device=device)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_probabilities = logits.to(dtype).log_softmax(-1)
        total = log_probabilities.gather(-1, ids[0, len(prompt_ids) :, None]).sum()
        total.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return total.item(), sum(float(g.double().square().sum()) for g in gradients)
