"""Scorer: a model and (prompt ids, answer ids) in, uncertainties out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from gnuq_serve.gradnorm import cover, gradient_pass
from gnuq_serve.uncertainty import Mode, Uncertainty
from gnuq_serve.weights import fingerprint_of, load_checkpoint


class InvalidSampleError(ValueError):
    """A sample that can't be scored; the message names its field and the remedy."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer to score: token ids of what the model read, and of what it wrote."""

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]

    @property
    def length(self) -> int:
        """Positions that the pass visits: the last answer token is predicted, never read."""
        return len(self.prompt_ids) + len(self.answer_ids) - 1


class Scorer:
    """Scores answers of one model with one gradient pass each batch.

    The model's parameters are left as they are: none gets a ``.grad``, and ``requires_grad`` and training mode
    are restored after each call. One thread at a time may score with a model.
    """

    mode: Mode = "exact"

    def __init__(self, model: nn.Module, *, max_batch_tokens: int = 2048) -> None:
        """Score with a model in memory.

        Args:
            model: a Hugging Face causal language model.
            max_batch_tokens: padded positions in one pass; a longer sample gets a pass of its own.

        Raises:
            UnsupportedModelError: a module with parameters has no rule; the message names it.
            ValueError: ``max_batch_tokens`` is below 1.
        """
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens={max_batch_tokens} must be at least 1")
        self.model = model
        self.max_batch_tokens = max_batch_tokens
        self._coverage = cover(model)
        config: Any = model.config
        self.vocabulary_size = self._coverage.embedding_weight.shape[0]
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        self.dtype = str(self._coverage.embedding_weight.dtype).removeprefix("torch.")
        self.device = str(self._coverage.embedding_weight.device)
        self.fingerprint = fingerprint_of(model, self.mode)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        config_overrides: Mapping[str, Any] | None = None,
        max_batch_tokens: int = 2048,
    ) -> Scorer:
        """Load a checkpoint and score with it; arguments as in ``weights.load_checkpoint``.

        Raises:
            CheckpointError: the checkpoint can't be loaded, or the dtype or device does not exist.
            UnsupportedModelError: a module with parameters has no rule.
        """
        model = load_checkpoint(
            str(path),
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            config_overrides=config_overrides,
        )
        return cls(model, max_batch_tokens=max_batch_tokens)

    @classmethod
    def from_model(cls, model: nn.Module, *, max_batch_tokens: int = 2048) -> Scorer:
        """Score with a module already in memory."""
        return cls(model, max_batch_tokens=max_batch_tokens)

    def score(
        self,
        samples: Sequence[Sample],
        *,
        on_invalid: Literal["raise", "fail"] = "raise",
        progress: bool = False,
    ) -> list[Uncertainty]:
        """Score answers, in batches of similar length.

        Args:
            samples: what to score.
            on_invalid: ``"raise"`` before any work is done, or ``"fail"`` only the samples concerned.
            progress: show a progress bar.

        Returns:
            One uncertainty for each sample, in their order. ``seconds`` is the time of the sample's pass.

        Raises:
            InvalidSampleError: a sample is empty, out of the vocabulary or too long, and ``on_invalid`` is
                ``"raise"``.
        """
        results: list[Uncertainty | None] = [None] * len(samples)
        for i, sample in enumerate(samples):
            if (problem := self.problem_with(sample)) is not None:
                if on_invalid == "raise":
                    raise InvalidSampleError(f"samples[{i}].{problem}")
                results[i] = Uncertainty.failed(problem)
        order = sorted((i for i, result in enumerate(results) if result is None), key=lambda i: samples[i].length)
        with tqdm(total=len(order), desc="Scoring", unit="answer", disable=not progress) as bar:
            for batch in self._batches(samples, order):
                for i, result in zip(batch, self._score_batch([samples[i] for i in batch]), strict=True):
                    results[i] = result
                bar.update(len(batch))
        return [result for result in results if result is not None]

    def problem_with(self, sample: Sample) -> str | None:
        """Why a sample can't be scored, beginning with the field's name; None if it can."""
        for name, ids in (("prompt_ids", sample.prompt_ids), ("answer_ids", sample.answer_ids)):
            if len(ids) == 0:
                return f"{name} is empty: give at least one token"
            if any(not isinstance(i, int) for i in ids):
                return f"{name} holds something that is no integer: give a list of token ids"
            if min(ids) < 0 or max(ids) >= self.vocabulary_size:
                outside = next(i for i in ids if not 0 <= i < self.vocabulary_size)
                return (
                    f"{name} holds {outside}, outside the scorer's vocabulary of {self.vocabulary_size}: "
                    "were the ids made by another model's tokenizer?"
                )
        total = len(sample.prompt_ids) + len(sample.answer_ids)
        if self.context_length is not None and total > self.context_length:
            return (
                f"prompt_ids and answer_ids have {total} tokens, over the model's context of "
                f"{self.context_length}: shorten the prompt"
            )
        return None

    def _batches(self, samples: Sequence[Sample], order: list[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        for i in order:  # by length, so the newest is the longest and sets the padding
            if batch and (len(batch) + 1) * samples[i].length > self.max_batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _score_batch(self, samples: list[Sample]) -> list[Uncertainty]:
        start = time.perf_counter()
        result = gradient_pass(self.model, self._coverage, [(s.prompt_ids, s.answer_ids) for s in samples])
        seconds = time.perf_counter() - start
        return [
            Uncertainty.scored(
                token_log_probabilities=log_probabilities.tolist(),
                token_entropies=entropies.tolist(),
                grad_norm_sq=norm_sq.item(),
                mode=self.mode,
                fingerprint=self.fingerprint,
                seconds=seconds,
            )
            for log_probabilities, entropies, norm_sq in zip(
                result.token_log_probabilities, result.token_entropies, result.grad_norm_sq, strict=True
            )
        ]
