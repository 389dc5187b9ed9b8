"""N sampled answers: self-consistency and semantic entropy.

Self-consistency: how many of them disagree with the answer. Discrete semantic entropy: the entropy over their
meanings (Farquhar et al. 2024, Nature 630:625).

Answers mean the same where the matcher (their words in normal form), a sentence encoder, or an NLI model says so.
Where the answer is one of given choices, the probabilities of the choices stand for infinitely many samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from gnuq_serve.evaluation.answered import Answered
from gnuq_serve.evaluation.methods.base import Method, each


def choice_probabilities(answer: Answered) -> list[float]:
    """Probabilities of the choices among themselves."""
    logs = answer.choice_log_probabilities
    top = max(logs)
    weights = [math.exp(value - top) for value in logs]
    return [weight / sum(weights) for weight in weights]


def entropy_of(shares: Sequence[float]) -> float:
    """In nats; shares sum to 1."""
    return abs(-sum(share * math.log(share) for share in shares if share > 0))


def _semantic_entropy(step: str) -> Callable[[Answered], float | None]:
    def read(answer: Answered) -> float | None:
        if answer.choice_log_probabilities:
            return entropy_of(choice_probabilities(answer))
        clusters = answer.result(step, "clusters")
        if not clusters:
            return None
        return entropy_of([count / len(clusters) for count in Counter(clusters).values()])

    return read


def _disagreement(step: str) -> Callable[[Answered], float | None]:
    def read(answer: Answered) -> float | None:
        if answer.choice_log_probabilities and answer.choice is not None:
            return 1.0 - choice_probabilities(answer)[answer.choice]
        agreeing: list[bool] | None = answer.result(step, "agrees")
        return 1.0 - sum(agreeing) / len(agreeing) if agreeing else None

    return read


_BY = {"": ("same_words", "words"), "_encoder": ("encoder", "sentence encoder"), "_nli": ("nli", "NLI model")}

METHODS = tuple(
    method
    for ending, (step, by) in _BY.items()
    for method in (
        Method(
            name=f"self_consistency{ending}",
            title=f"share of samples that say something else ({by})",
            needs=("score", "samples", step),
            pays=("samples", step),
            values=each(_disagreement(step)),
        ),
        Method(
            name=f"semantic_entropy{ending}",
            title=f"entropy over the samples' meanings ({by})",
            needs=("score", "samples", step),
            pays=("samples", step),
            values=each(_semantic_entropy(step)),
        ),
    )
)
