"""What is raised where an answer must have a score."""

from __future__ import annotations

from typing import Literal

from gnuq_serve.uncertainty import Uncertainty

OnFailure = Literal["open", "closed"]


class UnscoredAnswerError(RuntimeError):
    """An answer without a score, where ``on_failure="closed"`` asks for one.

    Attributes:
        uncertainty: the object of that answer, with its ``status`` and ``reason``.
    """

    def __init__(self, uncertainty: Uncertainty) -> None:
        self.uncertainty = uncertainty
        super().__init__(
            f"the answer was not scored: {uncertainty.status} ({uncertainty.reason or 'no reason given'}). "
            "Ask a gnuq-serve server, without `uncertainty: false`, "
            'or let unscored answers pass with on_failure="open"'
        )
