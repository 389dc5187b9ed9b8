"""The work that no way around avoids, in the scorer's own batches: a forward pass, and the limit.

The limit is a forward pass, and a backward pass to the input embeddings with frozen weights: what is left of
gradient norms when the norms themselves are free. Both compute logits at answer positions only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gnuq_serve import Sample, Scorer
from rivals.padded import NO_TARGET, Padded, negative_log_probability

# Forward pass and limit share what was learned.
_known: WeakKeyDictionary[Scorer, dict[int, list[list[Sample]]]] = WeakKeyDictionary()


class _SameBatches:
    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.model: Any = scorer.model

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Learn the scorer's batches (it scores once), so that timed calls do not have to."""
        self._batches(samples)

    def _batches(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        key = hash(tuple((*sample.prompt_ids, -1, *sample.answer_ids) for sample in samples))
        known = _known.setdefault(self.scorer, {})
        if key not in known:
            known[key] = batches_of(self.scorer, samples)
        return known[key]

    def _loss(self, embedded: Tensor, padded: Padded) -> Tensor:
        hidden = self.model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        asked = padded.targets != NO_TARGET
        logits = self.model.get_output_embeddings()(hidden[:, -padded.targets.shape[1] :][asked])
        return negative_log_probability(logits, padded.targets[asked])


class ForwardOnly(_SameBatches):
    """Log-probabilities alone; no norms, and so nothing is returned."""

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """Do the work; there is nothing to return."""
        for batch in self._batches(samples):
            padded = Padded.of(batch)
            self._loss(self.model.get_input_embeddings()(padded.ids), padded)
        return []


class Limit(_SameBatches):
    """Forward, and backward to the input embeddings; no norms, and so nothing is returned."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """Do the work; there is nothing to return."""
        batches = self._batches(samples)
        with frozen(self.model):
            for batch in batches:
                padded = Padded.of(batch)
                embedded = self.model.get_input_embeddings()(padded.ids).requires_grad_(True)
                torch.autograd.grad(self._loss(embedded, padded), embedded)
        return []


def batches_of(scorer: Scorer, samples: Sequence[Sample]) -> list[list[Sample]]:
    """How the scorer groups the samples, read off the ids that its model's embedding is given.

    Raises:
        RuntimeError: a batch is not made of the samples' own rows, padded on the right.
    """
    scorer.score(samples[:1])  # at first use the scorer measures its memory, by passes of its own
    seen: list[Tensor] = []
    embedding = scorer.model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda _module, args: seen.append(args[0].clone()))
    try:
        scorer.score(samples)
    finally:
        handle.remove()
    waiting = sorted(samples, key=lambda sample: -sample.length)  # a short one may be the beginning of a long one
    batches = []
    for ids in seen:
        batch = []
        for row in ids.tolist():
            found = next((s for s in waiting if row[: s.length] == [*s.prompt_ids, *s.answer_ids][:-1]), None)
            if found is None:
                raise RuntimeError("the scorer's batches are not rows of samples: the limit can't repeat them")
            waiting.remove(found)
            batch.append(found)
        batches.append(batch)
    if waiting:
        raise RuntimeError(f"{len(waiting)} samples went by the embedding: the limit can't repeat their batches")
    return batches


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside; as before outside."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
