"""How an answer is scored: what the scorer is asked, in this process or another. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from gnuq_serve.uncertainty import Mode


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """How to score.

    Attributes:
        mode: ``"exact"`` (every position), or ``"answer_only"`` (keys and values of the prompt are constants:
            cheaper on long prompts, and kept for the samples that share them).
        trace: also each answer token by itself.
        semantic: also SemGrad and its relatives, by one more backward pass; not in ``answer_only``.
    """

    mode: Mode = "exact"
    trace: bool = False
    semantic: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r} is unknown; use {' or '.join(get_args(Mode))}")
