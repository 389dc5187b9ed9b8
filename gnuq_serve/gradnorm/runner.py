"""Passes over many samples: packed by length to the memory budget, split where memory runs out all the same."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gnuq_serve.gradnorm.backward import PassResult, gradient_pass
from gnuq_serve.gradnorm.batch import Ids
from gnuq_serve.gradnorm.coverage import Coverage
from gnuq_serve.gradnorm.memory import MemoryModel, measure
from gnuq_serve.gradnorm.packing import PASS_OVERHEAD, Size, batches
from gnuq_serve.gradnorm.prefix import PrefixCache
from gnuq_serve.gradnorm.trace import token_grad_norms

# Of the budget: what kept prompt prefixes may take.
PREFIX_SHARE = 0.25
# Tokens of a trace that share a forward pass: the later the group's end, the more of it each one drags along.
TRACE_GROUP = 16
MAX_TRACE_AT_ONCE = 8

# What plain RuntimeErrors of the allocators say.
_ALLOCATORS_SAY = ("out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True, slots=True)
class Task:
    """What is wanted of each sample; see ``ScoreOptions``."""

    answer_only: bool = False
    trace: bool = False
    semantic: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """What one pass measured of one sample; ``seconds`` is the wall time of its batch's pass."""

    index: int
    result: PassResult
    row: int
    token_grad_norm_sq: list[float] | None
    seconds: float


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """A sample for which memory did not suffice even alone."""

    index: int
    reason: str


class PassRunner:
    """Runs passes of one model within a memory budget.

    Attributes:
        prefixes: keys and values of prompts, kept for ``answer_only``.
    """

    def __init__(
        self,
        model: nn.Module,
        coverage: Coverage,
        *,
        budget: int,
        max_batch_tokens: int | None,
        position: int | None,
    ) -> None:
        """See ``Scorer``."""
        self.prefixes = PrefixCache(model, int(budget * PREFIX_SHARE))
        self._model = model
        self._coverage = coverage
        self._budget = budget
        self._max_batch_tokens = max_batch_tokens
        self._position = position
        self._memories: dict[bool, MemoryModel] = {}
        self._kept = 0  # bytes of prefixes

    def memory_in(self, answer_only: bool) -> MemoryModel:
        """What a pass takes, measured at first use."""
        if answer_only not in self._memories:
            self._memories[answer_only] = measure(self._model, self._coverage, answer_only=answer_only)
        return self._memories[answer_only]

    def run(
        self, samples: Sequence[Ids], *, answer_only: bool = False, trace: bool = False, semantic: bool = False
    ) -> Iterator[list[Measured | OutOfMemory]]:
        """Score all samples; yields each batch as it is done."""
        task = Task(answer_only, trace, semantic and not answer_only)
        self._kept = self.prefixes.nbytes
        overhead = PASS_OVERHEAD.get(self._coverage.embedding_weight.device.type, 0)
        for batch in batches(samples, answer_only, overhead, lambda size: self._fits(size, task)):
            yield self._attempt(samples, batch, task)
            self._kept = self.prefixes.nbytes

    def _fits(self, size: Size, task: Task) -> bool:
        if self._coverage.slow:
            return False  # one sample at a time
        if self._max_batch_tokens is not None and size.padded > self._max_batch_tokens:
            return False
        return self._bytes(size, task) <= self._budget

    def _bytes(self, size: Size, task: Task, *, recompute: int = 0, at_once: int = 1) -> int:
        """What a pass takes, and beside it the prefixes: those in the cache, or more where it can't keep them."""
        memory = self.memory_in(task.answer_only)
        prefixes = max(self._kept, int(size.prompts * size.prefix * memory.per_cached_token))
        return prefixes + memory.bytes(
            size.longest,
            size.samples,
            size.answer_tokens,
            prefix=size.prefix,
            recompute=recompute,
            at_once=at_once,
            semantic=task.semantic,
        )

    def _recompute(self, size: Size, task: Task, sparing: bool) -> int:
        """The fewest blocks that must run again for the pass to stay in the budget; all where none suffices."""
        every = len(self._coverage.blocks)
        if sparing:
            return every
        fitting = (n for n in range(every) if self._bytes(size, task, recompute=n) <= self._budget)
        return next(fitting, every)

    def _attempt(
        self, samples: Sequence[Ids], batch: list[int], task: Task, *, sparing: bool = False
    ) -> list[Measured | OutOfMemory]:
        try:
            return list(self._pass(samples, batch, task, sparing))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: the error's traceback holds the failed pass's tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) > 1:
            half = len(batch) // 2
            parts = (batch[:half], batch[half:])
            return [item for part in parts for item in self._attempt(samples, part, task)]
        if not sparing:
            self.prefixes.clear()
            return self._attempt(samples, batch, task, sparing=True)
        tokens = sum(map(len, samples[batch[0]]))
        return [OutOfMemory(batch[0], f"out of memory for {tokens} tokens, though alone: shorten the prompt")]

    def _pass(self, samples: Sequence[Ids], batch: list[int], task: Task, sparing: bool) -> Iterator[Measured]:
        start = time.perf_counter()
        chosen = [samples[i] for i in batch]
        prefixes = None
        if task.answer_only:
            prefixes = [self.prefixes.keys_and_values(prompt[:-1]) for prompt, _ in chosen]
        result = gradient_pass(
            self._model,
            self._coverage,
            chosen,
            prefixes=prefixes,
            semantic=task.semantic,
            position=self._position,
            recompute=self._recompute(Size.of(chosen, task.answer_only), task, sparing),
        )
        traces: list[list[float] | None] = [None] * len(chosen)
        if task.trace:
            for b, sample in enumerate(chosen):
                own = None if prefixes is None else prefixes[b : b + 1]
                traces[b] = self._trace(sample, own, task, sparing)
        seconds = time.perf_counter() - start
        for b, i in enumerate(batch):
            yield Measured(i, result, b, traces[b], seconds)

    def _trace(self, sample: Ids, prefixes: Sequence[Any] | None, task: Task, sparing: bool) -> list[float]:
        size = Size.of([sample], task.answer_only)
        recompute = self._recompute(size, task, sparing)
        at_once = 1
        while (
            not sparing
            and at_once < MAX_TRACE_AT_ONCE
            and self._bytes(size, task, recompute=recompute, at_once=at_once + 1) <= self._budget
        ):
            at_once += 1
        norms = token_grad_norms(
            self._model,
            self._coverage,
            sample,
            prefixes=prefixes,
            group=TRACE_GROUP,
            at_once=at_once,
            recompute=recompute,
        )
        values: list[float] = norms.tolist()
        return values


def is_out_of_memory(error: Exception) -> bool:
    """An allocator's refusal, and no other error."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(text in str(error) for text in _ALLOCATORS_SAY)
