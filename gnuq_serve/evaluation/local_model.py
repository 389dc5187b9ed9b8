"""The served weights in this process, for what no server gives: a hidden state, and the head's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gnuq_serve.evaluation.hidden_state import encode
from gnuq_serve.evaluation.prompt_positions import PromptPositions
from gnuq_serve.evaluation.steps.base import Result
from gnuq_serve.weights import load_checkpoint
from gnuq_serve.weights.room import weight_bytes

DEPTH = 0.6  # of the layers: about where SAPLMA (arXiv:2304.13734) finds truth easiest to read


class LocalModel:
    """One forward pass an answer.

    Args:
        path: the checkpoint's folder.
        dtype: of its weights.

    Raises:
        CheckpointError: it can't be loaded.
    """

    def __init__(self, path: str, *, dtype: str = "auto") -> None:
        self._use(load_checkpoint(path, dtype=dtype, device="auto"))

    @classmethod
    def of(cls, model: Any) -> LocalModel:
        """With a model in memory."""
        made = cls.__new__(cls)
        made._use(model)
        return made

    def _use(self, model: Any) -> None:
        self._model = model.eval().requires_grad_(False)
        self._device = model.get_input_embeddings().weight.device
        self.bytes = weight_bytes(model)

    def positions(self) -> PromptPositions:
        """SemGrad at several positions, with the same weights."""
        return PromptPositions(self._model)

    def measure(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Result:
        """The state that predicts the answer's last token, and the squared norm of the head's gradient."""
        state, norm = self.read(prompt_ids, answer_ids)
        return {"state": encode(state.double().cpu().numpy()), "head_grad_norm_sq": norm}

    def read(self, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> tuple[Tensor, float]:
        """``(d,)`` and ``||dl/dW||^2``: the sum over positions of ``(h h^T) * (delta delta^T)``."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def at_head(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs.append(args[0])
            # Autograd begins here: what follows the head (soft-capping, scaling) is differentiated too.
            outputs.append(output.detach().requires_grad_())
            return outputs[-1]

        head = self._model.get_output_embeddings()
        hook = head.register_forward_hook(at_head)
        ids = torch.tensor([[*prompt_ids, *answer_ids]], device=self._device)
        count = len(answer_ids)
        try:
            with torch.enable_grad():
                found = self._model(ids[:, :-1], use_cache=False, output_hidden_states=True, logits_to_keep=count)
                logs = found.logits[0].float().log_softmax(-1)
                total = logs.gather(-1, ids[0, -count:, None].to(logs.device)).sum()
            (delta,) = torch.autograd.grad(total, outputs[0])
        finally:
            hook.remove()
        h, delta = inputs[0][0].float(), delta[0].float().to(inputs[0].device)
        norm = ((h @ h.T) * (delta @ delta.T)).sum().item()
        layers = found.hidden_states
        return layers[round(DEPTH * (len(layers) - 1))][0, -1], norm
