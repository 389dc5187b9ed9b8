"""Per-sample gradients with ``torch.func``: ``vmap(grad(functional_call))``, in chunks that fit in memory."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gnuq_serve import Sample
from rivals.padded import Padded, by_length, negative_log_probability

# While the backward pass runs, a tied weight's two shares stand beside their sum.
COPIES_OF_THE_WEIGHTS = 3


class PerSampleGradients:
    """Every sample's gradient in full, several at a time; logits from the first answer position on."""

    def __init__(self, model: nn.Module, chunk: int | None = None) -> None:
        """Prepare.

        Args:
            model: a Hugging Face causal language model.
            chunk: gradients held at a time; default: what a third of the free memory holds, at most 16.
        """
        self.model = model
        self.chunk = chunk or _chunk_that_fits(model)
        self._gradients = vmap(grad(self._loss), in_dims=(None, 0, 0))

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """``||grad_theta l||^2`` of each sample."""
        norms = [0.0] * len(samples)
        parameters = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        for chunk in by_length(samples, self.chunk):
            batch = Padded.of([samples[i] for i in chunk])
            with warnings.catch_warnings():
                # Attention has no batching rule on CPUs: torch says that it runs sample by sample there.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                gradients = self._gradients(parameters, batch.ids, batch.targets)
            total = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
            for i, norm_sq in zip(chunk, total.tolist(), strict=True):
                norms[i] = norm_sq
        return norms

    def _loss(self, parameters: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
        options = {"use_cache": False, "logits_to_keep": len(targets)}
        logits = functional_call(self.model, parameters, (ids[None],), options).logits
        return negative_log_probability(logits[0], targets)


def _chunk_that_fits(model: nn.Module) -> int:
    sample_bytes = COPIES_OF_THE_WEIGHTS * sum(p.numel() * p.element_size() for p in model.parameters())
    return max(1, min(16, _available_bytes() // 3 // sample_bytes))


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
