"""Opacus's ghost norms: per-sample gradient norms from activations and output gradients, without the gradients.

Opacus refuses tied weights and evaluation mode, so it works on an untied copy in training mode. Its norm is that
of the untied model: two weights where the tied model has one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from gnuq_serve import Sample
from rivals.padded import Padded, by_length, negative_log_probability


class OpacusGhostNorms:
    """Batches of samples of similar length; logits from the first answer position on."""

    def __init__(self, model: nn.Module, max_batch_tokens: int = 2048) -> None:
        """Copy the model and attach Opacus's hooks.

        Raises:
            ModuleNotFoundError: opacus is not installed (``pip install 'gnuq-serve[bench]'``).
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of hooks that miss gradients of inputs; none is wanted
            from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
                GradSampleModuleFastGradientClipping,
            )

        self.untied = untied_copy(model)
        for module in self.untied.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.model = GradSampleModuleFastGradientClipping(
            self.untied, loss_reduction="sum", strict=False, use_ghost_clipping=True
        ).train()
        self.max_batch_tokens = max_batch_tokens

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """``||grad_theta l||^2`` of each sample."""
        norms = [0.0] * len(samples)
        size = max(1, self.max_batch_tokens // max(sample.length for sample in samples))
        for chunk in by_length(samples, size):
            batch = Padded.of([samples[i] for i in chunk])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                kept = batch.targets.shape[1]
                logits = self.model(input_ids=batch.ids, use_cache=False, logits_to_keep=kept).logits
                negative_log_probability(logits, batch.targets).backward()
            for i, norm in zip(chunk, self.model.get_norm_sample().tolist(), strict=True):
                norms[i] = norm**2
            self.model.zero_grad(set_to_none=True)
        return norms


def untied_copy(model: nn.Module) -> Any:
    """A trainable copy whose head has a weight of its own."""
    untied: Any = copy.deepcopy(model)
    head = untied.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    untied.requires_grad_(True)
    return untied
