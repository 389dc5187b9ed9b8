"""SemGrad (arXiv:2605.04638) at several prompt positions, from one backward pass.

A server has one position (`hidden_position`); which one is best differs from set to set.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from gnuq_serve.evaluation.steps.base import Result
from gnuq_serve.gradnorm import cover
from gnuq_serve.gradnorm.batch import Batch
from gnuq_serve.gradnorm.hidden import HiddenGradients

# Name -> position from the prompt's end; None: the mean over the prompt.
POSITIONS = {"mean": None, "last": -1, "second_last": -2, "fourth_last": -4}


class PromptPositions:
    """SemGrad of one answer at all `POSITIONS`; see `gnuq_serve.gradnorm.semantic` for the formula.

    Args:
        model: in memory, frozen.

    Raises:
        UnsupportedModelError: its blocks are not known.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._coverage = model, cover(model)

    def measure(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Result:
        """SemGrad by position."""
        coverage = self._coverage
        batch = Batch.of([(prompt_ids, answer_ids)], coverage.embedding_weight.device)
        looks = {
            name: HiddenGradients(coverage.blocks, coverage.embedding, batch, position)
            for name, position in POSITIONS.items()
        }
        roots: list[Tensor] = []

        def begin(_module: Any, _args: Any, output: Tensor) -> None:
            roots.append(output.requires_grad_())

        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.callback(coverage.embedding.register_forward_hook(begin).remove)
            for look in looks.values():
                stack.enter_context(look.attached())
            logits = self._model(batch.ids, use_cache=False).logits[0, batch.spans[0]]
            logs = logits.float().log_softmax(-1)
            entropies = -(logs.detach().exp() * logs.detach()).sum(-1)
            chosen = logs.gather(-1, batch.targets[:, None].to(logs.device))[:, 0]
            for look in looks.values():
                look.expect(absolute=True)
            torch.autograd.grad(-(entropies * chosen).mean(), roots[0])
        found = {name: look.mean() for name, look in looks.items()}
        return {"semgrad": {name: None if value is None else value.item() for name, value in found.items()}}
