"""Hooks on every layer with parameters: remember the call on the way up, apply its rule on the way down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.hooks import RemovableHandle

from gnuq_serve.gradnorm.batch import Batch
from gnuq_serve.gradnorm.coverage import Coverage
from gnuq_serve.gradnorm.embedding import scaled
from gnuq_serve.gradnorm.hooks import removing
from gnuq_serve.gradnorm.layer_call import LayerCall, SharedInput
from gnuq_serve.gradnorm.local_autograd import tensors_of
from gnuq_serve.gradnorm.registry import Rule
from gnuq_serve.gradnorm.tied import TiedHead

# Matrix products with few rows and a long inner dimension (the vocabulary) take a kernel that sums in one
# long chain: measured, 1e-4 of the head's backward product in float32 below 5 rows, 1e-6 from 16 on.
MIN_HEAD_ROWS = 16


class Recorder:
    """One forward pass's calls, and the backward passes over it.

    The head stands apart: its inputs, packed to the rows that predict answer tokens, are cut from the graph, so
    that the backward pass comes in two stages, ``head`` and ``body``. In the head each row is by itself; the body
    can then be descended for any weighting of the rows.

    Attributes:
        packed: (1, N, d) the head's input, in the body's graph (N rows, then padding).
        rows: the same values, the leaf of the head's graph.
        tied_heads: for each sample the head's half of the tied cross term; empty where the head is not tied.
    """

    def __init__(self, coverage: Coverage, batch: Batch) -> None:
        self.packed: Tensor
        self.rows: Tensor
        self.tied_heads: list[TiedHead] = []
        self._coverage = coverage
        self._batch = batch
        self._shares: list[Tensor] = []
        self._leaves: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        # By identity of the tensor, which is kept so that no other takes its id while the forward pass runs.
        self._inputs: dict[int, tuple[Tensor, SharedInput]] = {}
        self._pending: dict[str, LayerCall] = {}
        self._called: set[str] = set()
        self._going_up = False
        self._silent = False
        self._keep = False
        self._count = True

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks are on inside: around the forward pass and all backward passes over it."""
        with ExitStack() as stack:
            for name, module, rule in self._coverage.rules:
                hook = self._layer_hook(name, rule)
                stack.enter_context(removing(module.register_forward_hook(hook, with_kwargs=True)))
            for name, module in self._coverage.inactive:
                stack.enter_context(removing(module.register_forward_pre_hook(_unexpected(name))))
            head = self._coverage.head
            stack.enter_context(removing(head.register_forward_pre_hook(self._pack_answers)))
            stack.enter_context(removing(head.register_forward_hook(self._keep_logits)))
            try:
                yield
            finally:
                # Else tensor -> graph -> hook -> self -> tensor live until the next garbage collection.
                self._leaves.clear()
                self._pending.clear()
                self._inputs.clear()
                for handle in self._handles:
                    handle.remove()
                for name in ("packed", "rows", "_logits"):
                    self.__dict__.pop(name, None)

    @contextmanager
    def going_up(self) -> Iterator[None]:
        """The forward pass itself; afterwards every layer must have been called.

        Raises:
            RuntimeError: a layer ran twice, never, or in a way that hides its samples from the rule.
        """
        self._going_up = True
        yield
        self._going_up = False
        self._inputs.clear()
        idle = [name for name, _, _ in self._coverage.rules if name not in self._called]
        if not hasattr(self, "rows"):
            idle.append("the head")
        if idle:
            raise RuntimeError(
                f"{idle[0]} was never called (its weight may be used elsewhere): its share is unknown"
            )

    def head(
        self,
        log_probability: Tensor,
        *,
        by_row: bool = False,
        look: Callable[[Tensor, Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Descend through the head.

        Args:
            log_probability: a sum over rows of something that each row's logits give.
            by_row: each answer token by itself instead of each sample.
            look: is shown the head's inputs (N, d) and the gradients at its output (N, V).

        Returns:
            (1, N + padding, d) gradient at ``rows``; squared norms of the head's share, (B,) or (N,).
        """
        delta, cotangent = torch.autograd.grad(log_probability, (self._logits, self.rows))
        del self._logits
        counts = self._batch.counts
        hidden, delta = self.rows.detach()[0, : sum(counts)], delta[0, : sum(counts)]
        if look is not None:
            look(hidden, delta)
        for b, (h, d) in enumerate(zip(hidden.split(counts), delta.split(counts), strict=True)):
            if self._coverage.tied:
                self.tied_heads.append(TiedHead.of(h, d, self._batch.ids[b]))
        sizes = [1] * len(hidden) if by_row else counts
        norms = [
            self._coverage.head_rule.function(self._coverage.head, LayerCall.of(h[None]), d[None])[0]
            for h, d in zip(hidden.split(sizes), delta.split(sizes), strict=True)
        ]
        return cotangent, self._on_batch_device(torch.stack(norms))

    def body(
        self, cotangent: Tensor, tied_heads: list[TiedHead], *, keep: bool = False, count: bool = True
    ) -> Tensor:
        """Descend from the head's input to the embeddings.

        Args:
            cotangent: gradient at ``rows``.
            tied_heads: the head's halves that belong to it.
            keep: another descent will follow.
            count: apply the rules; otherwise only other hooks see the gradients.

        Returns:
            (B,) float64: squared norm of the gradient of all parameters of the body, with the tied cross term.
        """
        self._keep, self._count, self._shares, self._tied = keep, count, [], tied_heads
        torch.autograd.grad(self.packed, self._leaves, cotangent, retain_graph=keep)
        shares, self._shares = self._shares, []
        return torch.stack(shares).sum(0) if count else cotangent.new_zeros(len(self._batch.spans))

    def inputs(self) -> list[Tensor]:
        """What is kept for the rules at this moment."""
        return [call.tensor for call in self._pending.values()]

    def _layer_hook(self, name: str, rule: Rule) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._silent:
                return None
            if self._going_up:
                if name in self._called:
                    raise RuntimeError(f"{name} ran twice in one forward pass: no rule for shared layers")
                self._called.add(name)
            if not torch.is_grad_enabled():  # a block that will run again on the way down
                return None
            if rule.every_output:
                return self._watch_every_output(name, module, rule, args, kwargs, output)
            watched = output if isinstance(output, Tensor) else output[rule.output]
            if not isinstance(watched, Tensor):
                raise RuntimeError(f"{name} did not return what its rule ({rule.name}) reads")
            if not watched.requires_grad:  # embeddings: here the backward pass ends
                if not self._going_up:
                    raise RuntimeError(f"{name} reads nothing of its block's input: the block can't be run again")
                watched.requires_grad_(True)
                self._leaves.append(watched)
            tensor = _first_tensor(name, args, kwargs)
            self._pending[name] = LayerCall(
                self._shared(tensor, watched.device),
                self._rows_of(name, tensor, watched),
                args if rule.keep_arguments else (),
                kwargs if rule.keep_arguments else {},
                watched.detach() if rule.keep_output else None,
            )
            runs_again = not self._going_up

            def on_gradient(delta: Tensor) -> None:
                self._inputs.clear()  # the forward pass that shared them is over
                # Frees the input once its last reader is done.
                call = self._pending[name] if self._keep and not runs_again else self._pending.pop(name)
                if not self._count:
                    return
                call.check_unchanged(name)
                self._add(rule.function(module, call, call.by_sample(delta)))
                if module is self._coverage.embedding and self._tied:
                    delta = scaled(module, delta)
                    self._add(torch.stack([tied.cross_term(delta[b]) for b, tied in enumerate(self._tied)]))

            watched.register_hook(on_gradient)
            return None

        return hook

    def _watch_every_output(
        self, name: str, module: nn.Module, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if len(self._batch.spans) > 1:
            raise RuntimeError(f"{name} goes the slow way ({rule.name}): one sample at a time")
        # The layer itself may use one output for another; through a view we see only what its caller does.
        ends = not any(o.requires_grad for o in tensors_of(output))  # embeddings: here the backward pass ends
        if isinstance(output, Tensor):
            output = self._seen(output, ends)
        elif isinstance(output, (tuple, list)):
            output = type(output)(self._seen(o, ends) if isinstance(o, Tensor) else o for o in output)
        else:
            raise RuntimeError(f"{name} returns a {type(output).__name__}: the slow way reads tensors and tuples")
        call = LayerCall(SharedInput(_first_tensor(name, args, kwargs)), None, args, kwargs)
        outputs = tensors_of(output)
        watched = [o for o in outputs if o.requires_grad]
        where = [i for i, o in enumerate(outputs) if o.requires_grad]
        count = len(outputs)

        def on_gradients(gradients: Any) -> None:
            if not self._count:
                return
            call.check_unchanged(name)
            deltas: list[Tensor | None] = [None] * count
            for i, gradient in zip(where, gradients, strict=True):
                deltas[i] = gradient
            self._silent = True  # its sublayers run again, and are counted already
            try:
                self._add(rule.function(module, call, deltas))  # type: ignore[arg-type]
            finally:
                self._silent = False

        if watched:
            self._handles.append(register_multi_grad_hook(watched, on_gradients))
        return output

    def _seen(self, output: Tensor, leaf: bool) -> Tensor:
        if leaf and output.is_floating_point():
            output = output.detach().requires_grad_()
            self._leaves.append(output)
        return output.view_as(output)

    def _shared(self, tensor: Tensor, device: torch.device) -> SharedInput:
        # A model split over devices hands a layer tensors of the device before; rules want them beside delta.
        _, shared = self._inputs.setdefault(id(tensor), (tensor, SharedInput(tensor)))
        return shared if shared.tensor.device == device else SharedInput(tensor.to(device))

    def _rows_of(self, name: str, tensor: Tensor, output: Tensor) -> tuple[int, int] | None:
        samples, length = self._batch.ids.shape
        if output.dim() == 2 and tensor.shape[0] == output.shape[0] == samples * length:
            return samples, length
        if output.dim() > 2 and tensor.shape[0] == output.shape[0] == samples:
            return None
        raise RuntimeError(f"{name} ran without a batch dimension: its samples cannot be told apart")

    def _pack_answers(self, _head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # Logits at answer positions only: (B, T, d) -> (1, N, d). Whatever the model does to logits
        # afterwards (soft-capping, scaling) then works on the packed ones.
        hidden = args[0]
        packed = torch.cat([hidden[b, span] for b, span in enumerate(self._batch.spans)])
        self.packed = nn.functional.pad(packed, (0, 0, 0, max(0, MIN_HEAD_ROWS - len(packed))))[None]
        self.rows = self.packed.detach().requires_grad_()
        return (self.rows, *args[1:])

    def _keep_logits(self, _head: nn.Module, _args: tuple[Any, ...], logits: Tensor) -> None:
        # As the head gives them: the model may cap or scale what it returns.
        self._logits = logits

    def _add(self, norm_sq: Tensor) -> None:
        self._shares.append(self._on_batch_device(norm_sq).double())

    def _on_batch_device(self, tensor: Tensor) -> Tensor:
        # Never read back to the host: that would stall a GPU once a layer.
        return tensor.to(self._batch.ids.device)


def _unexpected(name: str) -> Any:
    def hook(_module: nn.Module, _args: tuple[Any, ...]) -> None:
        raise RuntimeError(f"{name} was not in use when the model was covered: cover it again")

    return hook


def _first_tensor(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise RuntimeError(f"{name} was called without a tensor: no rule sees its input")
