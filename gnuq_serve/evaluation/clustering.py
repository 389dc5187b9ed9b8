"""Which sampled answers mean the same: greedy clusters, as in Kuhn et al., arXiv:2302.09664."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gnuq_serve.evaluation.steps.base import Result
from gnuq_serve.matching import last_number, normalize

Same = Callable[[str, str], bool]


def clusters(texts: Sequence[str], same: Same) -> list[int]:
    """The cluster of each text: that of the first text which means the same, else a new one."""
    first: list[str] = []
    found = []
    for text in texts:
        at = next((at for at, one in enumerate(first) if same(text, one)), len(first))
        if at == len(first):
            first.append(text)
        found.append(at)
    return found


def clustered(answer: str, samples: Sequence[str], same: Same) -> Result:
    """Clusters of the samples, and which of them mean the same as the answer."""
    return {"clusters": clusters(samples, same), "agrees": [same(text, answer) for text in samples]}


def same_words(one: str, other: str) -> bool:
    """Equal in normal form, or the words of one stand in the other in a row ("Paris", "It is Paris.")."""
    a, b = normalize(one), normalize(other)
    return a == b or bool(a and b and (f" {a} " in f" {b} " or f" {b} " in f" {a} "))


def same_number(one: str, other: str) -> bool:
    """The same last number; without numbers, the same words."""
    a, b = last_number(one), last_number(other)
    return same_words(one, other) if a is None and b is None else a == b
