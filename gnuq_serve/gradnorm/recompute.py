"""Activation checkpointing of the pass: keep each block's input only, and run the block again on the way down.

Chen et al., arXiv:1604.06174. Memory falls to one block's activations; time grows by one forward pass. The
layers' hooks do nothing while gradients are off, and do their work in the second run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, every block's forward pass keeps nothing but its input.

    A block takes its hidden states first, and returns them first; what else it returns carries no gradient.
    """
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_patched(block))
        yield


@contextmanager
def _patched(block: nn.Module) -> Iterator[None]:
    forward = block.forward
    own = "forward" in vars(block)  # accelerate too puts a forward on the instance

    def checkpointed(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        run = partial(_run, forward, args, kwargs)
        output, rest = _Checkpoint.apply(run, hidden)
        return output if rest is None else (output, *rest)

    block.forward = checkpointed
    try:
        yield
    finally:
        if own:
            block.forward = forward
        else:
            del block.forward


def _run(forward: Any, args: Any, kwargs: Any, hidden: Tensor) -> tuple[Tensor, tuple[Any, ...] | None]:
    output = forward(hidden, *args, **kwargs)
    return (output, None) if isinstance(output, Tensor) else (output[0], tuple(output[1:]))


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Any, hidden: Tensor) -> tuple[Tensor, tuple[Any, ...] | None]:
        ctx.run = run
        ctx.save_for_backward(hidden)
        # Made here and not on the way down, where vmap forbids it.
        ctx.leaf = hidden.detach().requires_grad_()
        before = hidden._version
        output: tuple[Tensor, tuple[Any, ...] | None] = run(hidden)  # gradients are off here
        if hidden._version != before:
            raise RuntimeError("a block changed its input in place: it can't be run again on the way down")
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        _ = ctx.saved_tensors  # raises if the input was changed in place since
        with torch.enable_grad():
            output, _ = ctx.run(ctx.leaf)
        return None, torch.autograd.grad(output, ctx.leaf, grads[0])[0]
