"""The pass: one forward, one backward to the input embeddings, each layer adding its share of the squared norm.

Parameters are frozen for its duration, so autograd computes no parameter gradient and stores none. Samples are
padded on the right and masked by causality alone: no real position ever attends to the padding behind it, so the
padding's gradient is exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnuq_serve.gradnorm.coverage import Coverage
from gnuq_serve.gradnorm.layer_input import LayerInput, accumulation_dtype
from gnuq_serve.gradnorm.linear import TILE_BYTES
from gnuq_serve.gradnorm.registry import Rule
from gnuq_serve.gradnorm.tied import TiedHead

# Matrix products with few rows and a long inner dimension (the vocabulary) take a kernel that sums in one
# long chain: measured, 1e-4 of the head's backward product in float32 below 5 rows, 1e-6 from 16 on.
MIN_HEAD_ROWS = 16


@dataclass(frozen=True, slots=True)
class PassResult:
    """What one pass measured, for each of the B samples.

    Attributes:
        token_log_probabilities: ``log p_t`` of the answer tokens, (T_b,) each.
        token_entropies: entropy in nats of each predictive distribution, (T_b,) each.
        grad_norm_sq: ``||grad_theta l||^2`` over all parameters, (B,) float64.
    """

    token_log_probabilities: list[Tensor]
    token_entropies: list[Tensor]
    grad_norm_sq: Tensor


@torch.inference_mode(mode=False)
def gradient_pass(
    model: nn.Module, coverage: Coverage, samples: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> PassResult:
    """Score a batch of (prompt ids, answer ids) pairs.

    Args:
        model: a Hugging Face causal language model.
        coverage: ``cover(model)``.
        samples: pairs of non-empty id lists, of any lengths; all inside the vocabulary.

    Raises:
        RuntimeError: a layer ran twice, never, or without a batch dimension, so that no rule fits it.
    """
    device = coverage.embedding_weight.device
    # The last answer token is predicted, never read: it needs no position.
    sequences = [[*prompt, *answer][:-1] for prompt, answer in samples]
    length = max(map(len, sequences))
    ids = torch.zeros((len(samples), length), dtype=torch.long)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    ids = ids.to(device)
    spans = [slice(len(prompt) - 1, len(prompt) - 1 + len(answer)) for prompt, answer in samples]
    targets = torch.tensor([token for _, answer in samples for token in answer], device=device)

    recorder = _Recorder(coverage, ids, spans)
    with frozen(model), torch.enable_grad():
        positions = torch.arange(length, device=device).expand(len(samples), length)
        with recorder.attached():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, : len(targets)]
        log_probabilities = logits.to(accumulation_dtype(logits)).log_softmax(-1)
        del logits
        chosen = log_probabilities.gather(-1, targets[:, None].to(log_probabilities.device))[:, 0]
        entropies = _entropies(log_probabilities.detach())
        del log_probabilities
        recorder.descend(chosen.sum())
    counts = [len(answer) for _, answer in samples]
    return PassResult(
        token_log_probabilities=list(chosen.detach().split(counts)),
        token_entropies=list(entropies.split(counts)),
        grad_norm_sq=recorder.norm_sq,
    )


class _Recorder:
    """Hooks on every layer with parameters: remember the input on the way up, apply the rule on the way down."""

    def __init__(self, coverage: Coverage, ids: Tensor, spans: list[slice]) -> None:
        # On the device: reading each layer's share back would stall a GPU once a layer.
        self.norm_sq = torch.zeros(len(spans), dtype=torch.float64, device=ids.device)
        self._leaves: list[Tensor] = []
        self._coverage = coverage
        self._ids = ids
        self._spans = spans
        # By identity of the tensor, which is kept so that no other takes its id while the forward pass runs.
        self._inputs: dict[int, tuple[Tensor, LayerInput]] = {}
        self._pending: dict[str, LayerInput] = {}
        self._seen: set[str] = set()
        self._head_ran = False
        self._tied_heads: list[TiedHead] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module, rule in self._coverage.rules:
                hook = self._layer_hook(name, rule)
                stack.enter_context(_removing(module.register_forward_hook(hook)))
            head = self._coverage.head
            stack.enter_context(_removing(head.register_forward_pre_hook(self._pack_answers)))
            stack.enter_context(_removing(head.register_forward_hook(self._head_hook)))
            yield
        self._inputs.clear()
        idle = [name for name, _, _ in self._coverage.rules if name not in self._seen]
        if not self._head_ran:
            idle.append("the head")
        if idle:
            raise RuntimeError(
                f"{idle[0]} was never called (its weight may be used elsewhere): its share is unknown"
            )

    def descend(self, log_probability: Tensor) -> None:
        """Run the backward pass; afterwards ``norm_sq`` is complete and nothing of the graph is kept."""
        torch.autograd.grad(log_probability, self._leaves)
        self._leaves.clear()  # leaf -> hook -> self -> leaf would live until the next garbage collection
        self._tied_heads.clear()

    def _layer_hook(self, name: str, rule: Rule) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not args:
                raise RuntimeError(f"{name} was called with keyword arguments only: no rule sees its input")
            tensor = args[0]
            if name in self._seen:
                raise RuntimeError(f"{name} ran twice in one forward pass: no rule for shared layers")
            if tensor.shape[0] != len(self._spans) or output.shape[0] != len(self._spans):
                raise RuntimeError(f"{name} ran without a batch dimension: its samples cannot be told apart")
            self._seen.add(name)
            _, inputs = self._inputs.setdefault(id(tensor), (tensor, LayerInput(tensor)))
            inputs.readers += 1
            self._pending[name] = inputs
            if not output.requires_grad:  # embeddings: here the backward pass ends
                output.requires_grad_(True)
                self._leaves.append(output)

            def on_gradient(delta: Tensor) -> None:
                inputs = self._pending.pop(name)  # frees the input once its last reader is done
                inputs.check_unchanged(name)
                self._add(rule.function(module, inputs, delta))
                if module is self._coverage.embedding and self._coverage.tied:
                    cross = [tied.cross_term(delta[b]) for b, tied in enumerate(self._tied_heads)]
                    self._add(torch.stack(cross))

            output.register_hook(on_gradient)

        return hook

    def _pack_answers(self, _head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # Logits at answer positions only: (B, T, d) -> (1, N, d). Whatever the model does to logits
        # afterwards (soft-capping, scaling) then works on the packed ones.
        hidden = args[0]
        packed = torch.cat([hidden[b, span] for b, span in enumerate(self._spans)])
        packed = nn.functional.pad(packed, (0, 0, 0, max(0, MIN_HEAD_ROWS - len(packed))))
        return (packed[None], *args[1:])

    def _head_hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        hidden = args[0].detach()
        self._head_ran = True

        def on_gradient(delta: Tensor) -> None:
            counts = [span.stop - span.start for span in self._spans]
            rows = sum(counts)
            norms = []
            for b, (h, d) in enumerate(
                zip(hidden[0, :rows].split(counts), delta[0, :rows].split(counts), strict=True)
            ):
                inputs = LayerInput(h[None])
                inputs.readers = 1
                norms.append(self._coverage.head_rule.function(module, inputs, d[None])[0])
                if self._coverage.tied:
                    self._tied_heads.append(TiedHead(h, d, self._ids[b].to(d.device)))
            self._add(torch.stack(norms))

        output.register_hook(on_gradient)

    def _add(self, norm_sq: Tensor) -> None:
        self.norm_sq += norm_sq.to(self.norm_sq)


def _entropies(log_probabilities: Tensor) -> Tensor:
    """``-sum_v p log p`` for each row of (N, V), in bounded extra memory."""
    rows = max(1, TILE_BYTES // (log_probabilities.shape[-1] * log_probabilities.element_size()))
    return torch.cat([torch.special.entr(part.exp()).sum(-1) for part in log_probabilities.split(rows)])


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient and no dropout is drawn inside; everything is as before outside."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@contextmanager
def _removing(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
