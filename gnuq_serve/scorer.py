"""Scorer: a model and (prompt ids, answer ids) in, uncertainties out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from gnuq_serve.gradnorm import cover
from gnuq_serve.gradnorm.memory import MemoryModel, default_budget, parse_bytes
from gnuq_serve.gradnorm.runner import Measured, OutOfMemory, PassRunner
from gnuq_serve.score_options import ScoreOptions
from gnuq_serve.uncertainty import Mode, Uncertainty, finite_or_none, log_or_none
from gnuq_serve.weights import check_in_memory, fingerprint_of, load_checkpoint

# On a CPU a larger pass is no faster a token.
MAX_CPU_BATCH_TOKENS = 2048


class InvalidSampleError(ValueError):
    """A sample that can't be scored; the message names its field and the remedy."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer to score: token ids of what the model read, and of what it wrote."""

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]

    @property
    def length(self) -> int:
        """Positions that an exact pass visits: the last answer token is predicted, never read."""
        return len(self.prompt_ids) + len(self.answer_ids) - 1


class Scorer:
    """Scores answers of one model with one gradient pass each batch.

    The model's parameters are left as they are: none gets a ``.grad``, and ``requires_grad`` and training mode
    are restored after each call. One thread at a time may score with a model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mode: Mode = "exact",
        memory_budget: int | str | None = None,
        max_batch_tokens: int | None = None,
        hidden_position: int | None = None,
        fingerprints: Mapping[Mode, str] | None = None,
    ) -> None:
        """Score with a model in memory.

        Args:
            model: a Hugging Face causal language model, on one device or split over several by a device map.
            mode: what ``score`` does where it is not told; see ``ScoreOptions``.
            memory_budget: what a pass may take beyond the weights, in bytes or as a text (``"2GiB"``); None for
                half of what is free, on a CPU 2 GiB at most. Batches are packed to it; a single long sample that
                is over it runs some blocks twice instead.
            max_batch_tokens: padded positions in one pass, whatever the memory; None for 2048 on a CPU, no limit
                on a GPU. A longer sample gets a pass of its own.
            hidden_position: prompt position of hidden-state gradients, from the prompt's end (-1: its last
                token); None for the mean over the prompt.
            fingerprints: names of these weights in each mode, where others than their own are wanted.

        Raises:
            UnsupportedModelError: the model's parameters can't all be counted; the message says which.
            CheckpointError: some of them are offloaded.
            ValueError: an argument is out of its range.
        """
        if max_batch_tokens is not None and max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens={max_batch_tokens} must be at least 1")
        if hidden_position is not None and hidden_position >= 0:
            raise ValueError(f"hidden_position={hidden_position} counts from the prompt's end: give -1 or below")
        self.model = model
        self.options = ScoreOptions(mode=mode)
        self.hidden_position = hidden_position
        check_in_memory(model)
        self._coverage = cover(model)
        config: Any = model.config
        weight = self._coverage.embedding_weight
        self.vocabulary_size = weight.shape[0]
        self.context_length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.dtype = str(weight.dtype).removeprefix("torch.")
        self.device = str(weight.device)
        self.max_batch_tokens = max_batch_tokens or (
            MAX_CPU_BATCH_TOKENS if weight.device.type == "cpu" else None
        )
        devices = {parameter.device for parameter in model.parameters()}
        self.memory_budget = (
            min(map(default_budget, devices)) if memory_budget is None else parse_bytes(memory_budget)
        )
        self._runner = PassRunner(
            model,
            self._coverage,
            budget=self.memory_budget,
            max_batch_tokens=self.max_batch_tokens,
            position=hidden_position,
        )
        self._fingerprints: dict[Mode, str] = dict(fingerprints or {})
        slow = self.slow_layers
        self._warnings = (f"slow exact path: {', '.join(slow)}",) if slow else ()

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        *,
        device_map: str | Mapping[str, Any] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        config_overrides: Mapping[str, Any] | None = None,
        map_converted: bool = False,
        **settings: Any,
    ) -> Scorer:
        """Load a checkpoint and score with it.

        Args:
            path: folder or hub name; this and the next as in ``weights.load_checkpoint``.
            dtype: ``"auto"``, a name or a torch dtype.
            device: ``"auto"``, a name or a torch device.
            device_map: instead of ``device``, where each module goes (``"balanced"``: split over all GPUs).
            revision: branch, tag or commit on the hub.
            trust_remote_code: run code that comes with the checkpoint.
            config_overrides: entries of the model's configuration to replace.
            map_converted: on a CPU, map weights of another dtype from a converted file in the cache.
            settings: as in ``Scorer``.

        Raises:
            CheckpointError: the checkpoint can't be loaded, or the dtype or device does not exist.
            UnsupportedModelError: the model's parameters can't all be counted.
        """
        model = load_checkpoint(
            str(path),
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
            config_overrides=config_overrides,
            map_converted=map_converted,
        )
        return cls(model, **settings)

    @classmethod
    def from_model(cls, model: nn.Module, **settings: Any) -> Scorer:
        """Score with a module already in memory; settings as in ``Scorer``."""
        return cls(model, **settings)

    @property
    def mode(self) -> Mode:
        """What ``score`` does where it is not told."""
        return self.options.mode

    @property
    def fingerprint(self) -> str:
        """Names the weights and the default mode: numbers under two names must not be compared."""
        return self.fingerprint_in(self.mode)

    @property
    def memory(self) -> MemoryModel:
        """What an ``exact`` pass takes, measured at first use."""
        return self._runner.memory_in(answer_only=False)

    def pass_bytes(self, tokens: int) -> int:
        """Most that an ``exact`` pass over this many positions takes beyond the weights, in bytes.

        As if every position were one of an answer; never over the budget, to which passes are cut.
        """
        return min(self.memory_budget, self.memory.bytes(tokens, 1, tokens))

    @property
    def slow_layers(self) -> list[str]:
        """Layers without a rule of their own: exact all the same, but slow and one sample at a time."""
        return self._coverage.slow

    def fingerprint_in(self, mode: Mode) -> str:
        """Names the weights and a mode."""
        if mode not in self._fingerprints:
            self._fingerprints[mode] = fingerprint_of(self.model, mode)
        return self._fingerprints[mode]

    def weights_changed(self) -> None:
        """Forget what was learned of the weights: somebody has changed their values in place."""
        self.clear_prefix_cache()
        self._fingerprints.clear()

    def clear_prefix_cache(self) -> None:
        """Forget the prompt prefixes kept by ``answer_only``."""
        self._runner.prefixes.clear()

    def score(
        self,
        samples: Sequence[Sample],
        *,
        mode: Mode | None = None,
        trace: bool = False,
        semantic: bool = False,
        on_invalid: Literal["raise", "fail"] = "raise",
        progress: bool = False,
    ) -> list[Uncertainty]:
        """Score answers, in batches of similar length.

        Args:
            samples: what to score.
            mode: see ``ScoreOptions``; None is the scorer's own.
            trace: see ``ScoreOptions``.
            semantic: see ``ScoreOptions``.
            on_invalid: ``"raise"`` before any work is done, or ``"fail"`` only the samples concerned.
            progress: show a progress bar.

        Returns:
            One uncertainty for each sample, in their order. ``seconds`` is the time of the sample's pass. A
            sample for which memory does not suffice even alone is ``failed``.

        Raises:
            InvalidSampleError: a sample is empty, out of the vocabulary or too long, and ``on_invalid`` is
                ``"raise"``.
            ValueError: an unknown mode.
        """
        options = ScoreOptions(mode or self.mode, trace, semantic)
        results: list[Uncertainty | None] = [None] * len(samples)
        for i, sample in enumerate(samples):
            if (problem := self.problem_with(sample)) is not None:
                if on_invalid == "raise":
                    raise InvalidSampleError(f"samples[{i}].{problem}")
                results[i] = Uncertainty.failed(problem)
        todo = [i for i, result in enumerate(results) if result is None]
        ids = [(samples[i].prompt_ids, samples[i].answer_ids) for i in todo]
        passes = self._runner.run(ids, answer_only=options.mode == "answer_only", trace=trace, semantic=semantic)
        with tqdm(total=len(todo), desc="Scoring", unit="answer", disable=not progress) as bar:
            for done in passes:
                for measured in done:
                    results[todo[measured.index]] = self._uncertainty(measured, options.mode)
                bar.update(len(done))
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

    def _uncertainty(self, measured: Measured | OutOfMemory, mode: Mode) -> Uncertainty:
        if isinstance(measured, OutOfMemory):
            return Uncertainty.failed(measured.reason)
        result, row = measured.result, measured.row

        def at_row(values: torch.Tensor | None) -> float | None:
            return None if values is None else finite_or_none(values[row].item())

        signals: dict[str, Any] = {}
        if result.input_grad_norm_sq is not None:
            at = self.hidden_position
            signals = {
                "log_input_grad_norm_sq": log_or_none(at_row(result.input_grad_norm_sq)),
                "log_hidden_grad": log_or_none(at_row(result.hidden_grad)),
                "hidden_position": "mean" if at is None else str(at),
            }
        if result.semantic is not None:
            for field in dataclasses.fields(result.semantic):
                signals[field.name] = at_row(getattr(result.semantic, field.name))
        return Uncertainty.scored(
            token_log_probabilities=result.token_log_probabilities[row].tolist(),
            token_entropies=result.token_entropies[row].tolist(),
            grad_norm_sq=result.grad_norm_sq[row].item(),
            token_grad_norm_sq=measured.token_grad_norm_sq,
            prompt_signals=signals,
            mode=mode,
            fingerprint=self.fingerprint_in(mode),
            warnings=self._warnings,
            seconds=measured.seconds,
        )
