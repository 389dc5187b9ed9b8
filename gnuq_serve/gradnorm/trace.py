"""The trace: ``||grad_theta log p_t||^2`` of each answer token by itself (arXiv:2605.07776), exact.

Token ``t`` depends on the positions before it alone. The tokens are taken in groups; each group runs the sequence
up to its last token forward once, and then descends for all its tokens together: the backward pass is linear in
the gradient that enters it, so ``vmap`` carries one for each token over the one graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gnuq_serve.gradnorm.backward import graph
from gnuq_serve.gradnorm.batch import Batch, Ids
from gnuq_serve.gradnorm.coverage import Coverage
from gnuq_serve.gradnorm.recorder import Recorder
from gnuq_serve.gradnorm.token_probability import token_log_probabilities


@torch.inference_mode(mode=False)
def token_grad_norms(
    model: nn.Module,
    coverage: Coverage,
    sample: Ids,
    *,
    prefixes: Sequence[Any] | None = None,
    group: int = 16,
    at_once: int = 8,
    recompute: int = 0,
) -> Tensor:
    """``||grad_theta log p_t||^2`` over all parameters for each of the T answer tokens, (T,) float64.

    Args:
        model: as in ``gradient_pass``.
        coverage: as in ``gradient_pass``.
        sample: one (prompt ids, answer ids) pair.
        prefixes: as in ``gradient_pass``, of this one sample.
        group: tokens that share a forward pass.
        at_once: tokens that descend together; memory for gradients is in proportion.
        recompute: as in ``gradient_pass``.

    Raises:
        RuntimeError: as in ``gradient_pass``.
    """
    prompt, answer = sample
    skip = 0 if prefixes is None else len(prompt) - 1
    norms = []
    for start in range(0, len(answer), group):
        # Tokens before the group are context here.
        part = ([*prompt, *answer[:start]], answer[start : start + group])
        batch = Batch.of([part], coverage.embedding_weight.device, skip)
        recorder = Recorder(coverage, batch)
        with graph(model, coverage, batch, recorder, prefixes=prefixes, recompute=recompute) as logits:
            log_probabilities, _ = token_log_probabilities(logits, batch.targets)
            del logits
            cotangent, head = recorder.head(log_probabilities.sum(), by_row=True)
            norms.append(head + _bodies(recorder, cotangent, len(head), 1 if coverage.slow else at_once))
    return torch.cat(norms)


def _bodies(recorder: Recorder, cotangent: Tensor, tokens: int, at_once: int) -> Tensor:
    def body(row: Tensor) -> Tensor:
        alone = torch.nn.functional.one_hot(row, cotangent.shape[1]).to(cotangent)[None, :, None]
        tied = [half.row(row) for half in recorder.tied_heads]
        return recorder.body(cotangent * alone, tied, keep=True)[0]

    rows = torch.arange(tokens, device=cotangent.device)
    if at_once == 1:  # layers on the slow path call autograd themselves, which vmap does not allow
        return torch.stack([body(row) for row in rows])
    with warnings.catch_warnings():
        # The fused attention's backward has no batched form: it runs once a token, which costs little.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return torch.cat([torch.vmap(body)(part) for part in rows.split(at_once)])
