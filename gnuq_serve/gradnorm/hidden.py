"""Gradients at the prompt's input embeddings and hidden states, read off as the backward pass goes by.

Hidden states are the outputs of the decoder blocks of the model's upper half, as in SemGrad (arXiv:2605.04638).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gnuq_serve.gradnorm.batch import Batch
from gnuq_serve.gradnorm.hooks import removing
from gnuq_serve.gradnorm.layer_call import accumulation_dtype


class HiddenGradients:
    """What one backward pass leaves at the prompt, for each of B samples.

    Attributes:
        position: ``None`` for the mean over the prompt, or an index from its end (-1: its last token).
        input_norm_sq: ``sum_p ||d/d e_p||^2`` over all prompt positions' input embeddings, (B,).
    """

    def __init__(
        self, blocks: Sequence[nn.Module], embedding: nn.Module, batch: Batch, position: int | None
    ) -> None:
        self.position = position
        self._embedding = embedding
        self._blocks = blocks[len(blocks) // 2 :]
        self._batch = batch
        self.expect()

    def expect(self, *, absolute: bool = False) -> None:
        """Forget the last backward pass; of the next one take norms, or mean absolute values."""
        self.input_norm_sq: Tensor | None = None
        self._absolute = absolute
        self._at_blocks: list[Tensor] = []

    def mean(self) -> Tensor | None:
        """Mean over layers and positions of ``||d/d h_p||``, or of ``mean |d/d h_p|``, (B,).

        None where the model has no known blocks.
        """
        return torch.stack(self._at_blocks).mean(0) if self._at_blocks else None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, a forward pass puts the hooks that its backward passes will meet."""
        self._watched: set[nn.Module] = set()
        with ExitStack() as stack:
            stack.enter_context(removing(self._embedding.register_forward_hook(self._watch(self._at_input))))
            for block in self._blocks:
                stack.enter_context(removing(block.register_forward_hook(self._watch(self._at_block))))
            yield

    def _watch(self, take: Any) -> Any:
        def hook(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if module in self._watched:  # it runs again, on the slow path
                return
            self._watched.add(module)
            hidden = output if isinstance(output, Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(take)

        return hook

    def _at_input(self, delta: Tensor) -> None:
        delta = delta.detach().to(accumulation_dtype(delta))
        norms = delta.square().sum(-1)
        self.input_norm_sq = torch.stack([norms[b, p].sum() for b, p in enumerate(self._batch.prompts)])

    def _at_block(self, delta: Tensor) -> None:
        delta = delta.to(accumulation_dtype(delta))
        values = delta.abs().mean(-1) if self._absolute else delta.square().sum(-1).sqrt()
        self._at_blocks.append(self._over_prompt(values).to(self._batch.ids.device))

    def _over_prompt(self, values: Tensor) -> Tensor:
        """(B, T) -> (B,)."""
        if self.position is None:
            return torch.stack([values[b, p].mean() for b, p in enumerate(self._batch.prompts)])
        # A prompt shorter than that has its first token taken.
        at = [max(0, p.stop + self.position) for p in self._batch.prompts]
        return torch.stack([values[b, i] for b, i in enumerate(at)])
