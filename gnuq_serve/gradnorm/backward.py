"""The pass: one forward, one backward to the input embeddings, each layer adding its share of the squared norm.

Parameters are frozen for its duration, so autograd computes no parameter gradient and stores none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnuq_serve.gradnorm.batch import Batch, Ids
from gnuq_serve.gradnorm.coverage import Coverage
from gnuq_serve.gradnorm.frozen import frozen
from gnuq_serve.gradnorm.hidden import HiddenGradients
from gnuq_serve.gradnorm.prefix import joined, positions_for
from gnuq_serve.gradnorm.recompute import recomputed
from gnuq_serve.gradnorm.recorder import Recorder
from gnuq_serve.gradnorm.semantic import HeadGradients, SemanticGradients
from gnuq_serve.gradnorm.token_probability import token_log_probabilities


@dataclass(frozen=True, slots=True)
class PassResult:
    """What one pass measured, for each of the B samples.

    Attributes:
        token_log_probabilities: ``log p_t`` of the answer tokens, (T_b,) each.
        token_entropies: entropy in nats of each predictive distribution, (T_b,) each.
        grad_norm_sq: ``||grad_theta l||^2`` over all parameters, (B,) float64.
        input_grad_norm_sq: ``sum_p ||dl/de_p||^2`` over the prompt's input embeddings, (B,).
        hidden_grad: mean of ``||dl/dh||`` over the upper half of the blocks and the prompt, (B,).
        semantic: SemGrad and its relatives, where asked for.
    """

    token_log_probabilities: list[Tensor]
    token_entropies: list[Tensor]
    grad_norm_sq: Tensor
    input_grad_norm_sq: Tensor | None = None
    hidden_grad: Tensor | None = None
    semantic: SemanticGradients | None = None


@torch.inference_mode(mode=False)
def gradient_pass(
    model: nn.Module,
    coverage: Coverage,
    samples: Sequence[Ids],
    *,
    prefixes: Sequence[Any] | None = None,
    semantic: bool = False,
    position: int | None = None,
    recompute: int = 0,
) -> PassResult:
    """Score a batch of (prompt ids, answer ids) pairs.

    Args:
        model: a Hugging Face causal language model.
        coverage: ``cover(model)``.
        samples: pairs of non-empty id lists, of any lengths; all inside the vocabulary.
        prefixes: for ``answer_only``: keys and values of each prompt but for its last token, taken as constants
            (``PrefixCache.keys_and_values``); all prompts then have one length. Prompt-side gradients are None.
        semantic: also SemGrad and its relatives, by one more backward pass over the same forward.
        position: prompt position of hidden-state gradients, from the prompt's end (-1: its last token); None
            for the mean over the prompt.
        recompute: for this many blocks, the first ones, keep the input only and run the block again on the way
            down: less memory, up to 40 % more time.

    Raises:
        RuntimeError: a layer ran twice, never, or without a batch dimension, so that no rule fits it.
    """
    skip = 0 if prefixes is None else len(samples[0][0]) - 1
    batch = Batch.of(samples, coverage.embedding_weight.device, skip)
    recorder = Recorder(coverage, batch)
    hidden = (
        None if prefixes is not None else HiddenGradients(coverage.blocks, coverage.embedding, batch, position)
    )
    with graph(model, coverage, batch, recorder, hidden, prefixes, recompute) as logits:
        log_probabilities, entropies = token_log_probabilities(logits, batch.targets)
        del logits
        head = HeadGradients(entropies, batch.counts) if semantic else None
        cotangent, norm_sq = recorder.head(log_probabilities.sum(), look=head)
        meaning = None
        if head is not None and hidden is not None:
            meaning = SemanticGradients.of(head, _semgrad(recorder, hidden, head.weights, cotangent))
        norm_sq = norm_sq + recorder.body(cotangent, recorder.tied_heads)
    return PassResult(
        token_log_probabilities=list(log_probabilities.detach().split(batch.counts)),
        token_entropies=list(entropies.split(batch.counts)),
        grad_norm_sq=norm_sq,
        input_grad_norm_sq=hidden.input_norm_sq if hidden else None,
        hidden_grad=hidden.mean() if hidden else None,
        semantic=meaning,
    )


@contextmanager
def graph(
    model: nn.Module,
    coverage: Coverage,
    batch: Batch,
    recorder: Recorder,
    hidden: HiddenGradients | None = None,
    prefixes: Sequence[Any] | None = None,
    recompute: int = 0,
) -> Iterator[Tensor]:
    """Run the forward pass and yield logits (N, V) of the answer tokens; backward passes may run inside."""
    arguments: dict[str, Any] = {"use_cache": prefixes is not None}
    if prefixes is not None:
        arguments["past_key_values"] = joined(prefixes)
    arguments |= positions_for(model, batch.positions)
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(recorder.attached())
        if hidden is not None:
            stack.enter_context(hidden.attached())
        if recompute:
            # A block with parameters on the slow path is run again by that path itself.
            again = [b for b in coverage.blocks[:recompute] if b not in coverage.slow_layers]
            stack.enter_context(recomputed(again))
        with recorder.going_up():
            logits = model(input_ids=batch.ids, **arguments).logits
        yield logits[0, : len(batch.targets)]


def _semgrad(recorder: Recorder, hidden: HiddenGradients, weights: Tensor, cotangent: Tensor) -> Tensor | None:
    # The head treats each row by itself: the cotangent of a weighted sum is the weighted cotangent.
    padded = nn.functional.pad(weights, (0, cotangent.shape[1] - len(weights)))
    hidden.expect(absolute=True)
    recorder.body(cotangent * padded[None, :, None].to(cotangent), [], keep=True, count=False)
    semgrad = hidden.mean()
    hidden.expect()
    return semgrad
