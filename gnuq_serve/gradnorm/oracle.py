"""The oracle: plain autograd, one sample at a time, every parameter's gradient in full.

Slow and large on purpose; it is what the pass is compared with, and shares nothing with it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gnuq_serve.gradnorm.oracle_attention import constant_keys_and_values

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class OracleSemantic:
    """SemGrad and its relatives (arXiv:2605.04638) of one answer."""

    semgrad: float
    exgrad: float
    paragrad: float
    hybridgrad: float


def count_padding_rows(model: nn.Module) -> None:
    """Let autograd differentiate the rows of ``padding_idx`` too: it drops them; the derivative is not zero."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None


class Oracle:
    """A copy of a model in a dtype of its own, differentiated by autograd with respect to all its parameters.

    Everywhere ``l = sum_t log p_t`` over the answer, natural logarithm.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        self.model = copy.deepcopy(model).to(dtype).eval().requires_grad_(True)
        count_padding_rows(self.model)

    def score(self, prompt_ids: Ids, answer_ids: Ids) -> tuple[float, float]:
        """``(l, ||grad_theta l||^2)``."""
        total = self._chosen(prompt_ids, answer_ids).sum()
        return total.item(), self._norm_sq(total)

    def token_grad_norms(self, prompt_ids: Ids, answer_ids: Ids) -> list[float]:
        """``||grad_theta log p_t||^2`` of each answer token."""
        return [self._norm_sq(log_p, keep=True) for log_p in self._chosen(prompt_ids, answer_ids)]

    def answer_only(self, prompt_ids: Ids, answer_ids: Ids) -> tuple[float, float]:
        """``(l, ||grad_theta l||^2)``, keys and values of all prompt positions but the last being constants.

        Positions meet in attention alone, so that nothing at those positions then has a gradient.

        Raises:
            RuntimeError: the model does not take its attention from transformers' registry.
        """
        with constant_keys_and_values(self.model, len(prompt_ids) - 1):
            return self.score(prompt_ids, answer_ids)

    def answer_only_tokens(self, prompt_ids: Ids, answer_ids: Ids) -> list[float]:
        """``token_grad_norms`` under the same constants."""
        with constant_keys_and_values(self.model, len(prompt_ids) - 1):
            return self.token_grad_norms(prompt_ids, answer_ids)

    def hidden_gradients(
        self, prompt_ids: Ids, answer_ids: Ids, position: int | None = None
    ) -> tuple[float, float]:
        """``sum_p ||dl/de_p||^2`` over the prompt's input embeddings; ``||dl/dh||`` at the prompt.

        The latter is the mean over the outputs of the upper half of the blocks and over all prompt positions, or
        at the position of that index from the prompt's end.
        """
        with self._kept_states() as states:
            total = self._chosen(prompt_ids, answer_ids).sum()
        at_input, *at_blocks = (g[0, : len(prompt_ids)] for g in torch.autograd.grad(total, states))
        norms = torch.stack([g.norm(dim=-1) for g in at_blocks])
        return at_input.square().sum().item(), _at(norms, position).mean().item()

    def semantic(self, prompt_ids: Ids, answer_ids: Ids, position: int | None = None) -> OracleSemantic:
        """SemGrad, ExGrad, ParaGrad and HybridGrad by their definitions; the head is untied for it."""
        with self._kept_states() as states, self._untied_head() as head_weight:
            log_p = self._log_p(prompt_ids, answer_ids)
        losses = -log_p.gather(-1, torch.tensor(answer_ids, device=log_p.device)[:, None])[:, 0]
        # x log x is 0 at 0, where a logit is minus infinity.
        entropies = torch.special.entr(log_p.detach().exp()).sum(-1)
        weighted = (entropies * losses).mean()
        *at_blocks, para = torch.autograd.grad(weighted, [*states[1:], head_weight], retain_graph=True)
        (ex,) = torch.autograd.grad(losses.mean(), head_weight)
        absolute = torch.stack([g[0, : len(prompt_ids)].abs().mean(-1) for g in at_blocks])
        semgrad, paragrad = _at(absolute, position).mean().item(), para.abs().mean().item()
        alpha = entropies.mean().neg().exp().item()
        return OracleSemantic(semgrad, ex.abs().mean().item(), paragrad, alpha * paragrad + (1 - alpha) * semgrad)

    def _log_p(self, prompt_ids: Ids, answer_ids: Ids) -> Tensor:
        device = next(self.model.parameters()).device
        ids = torch.tensor([[*prompt_ids, *answer_ids]], device=device)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
        log_p: Tensor = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return log_p

    def _chosen(self, prompt_ids: Ids, answer_ids: Ids) -> Tensor:
        log_p = self._log_p(prompt_ids, answer_ids)
        return log_p.gather(-1, torch.tensor(answer_ids, device=log_p.device)[:, None])[:, 0]

    def _norm_sq(self, scalar: Tensor, keep: bool = False) -> float:
        gradients = torch.autograd.grad(
            scalar, list(self.model.parameters()), allow_unused=True, retain_graph=keep
        )
        return sum(float(g.double().square().sum()) for g in gradients if g is not None)

    @contextmanager
    def _kept_states(self) -> Iterator[list[Tensor]]:
        """Collects the output of the embedding and of the upper half of the blocks, as a forward pass goes by."""
        states: list[Tensor] = []

        def keep(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states.append(output if isinstance(output, Tensor) else output[0])

        body = self.model.base_model
        blocks = next(getattr(body, name) for name in ("layers", "h", "blocks") if hasattr(body, name))
        watched = [self.model.get_input_embeddings(), *blocks[len(blocks) // 2 :]]  # type: ignore[operator]
        handles = [module.register_forward_hook(keep) for module in watched]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _untied_head(self) -> Iterator[nn.Parameter]:
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        weight = head.weight
        head.weight = nn.Parameter(weight.detach().clone())
        try:
            yield head.weight
        finally:
            head.weight = weight


def _at(values: Tensor, position: int | None) -> Tensor:
    return values if position is None else values[:, position]
