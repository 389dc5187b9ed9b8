"""Scoring by vLLM's worker, on its own tensors, for offline use: while it scores, it generates nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from tqdm import tqdm

from gnuq_serve.errors import first_line
from gnuq_serve.scorer import Sample
from gnuq_serve.uncertainty import Uncertainty
from gnuq_serve.weights.source import SourceRefused

_AT_A_TIME = 64  # samples in one call, between two steps of the progress bar


class WorkerScorer:
    """Scores like ``Scorer``, with the engine's weights; the engine must be idle meanwhile."""

    def __init__(self, llm: Any, dtype: str) -> None:
        """Have the worker build its scorer.

        Args:
            llm: ``vllm.LLM`` with our loader and worker extension.
            dtype: that it serves in.

        Raises:
            SourceRefused: the worker can't score with its tensors; the message says why.
        """
        self._llm, self.dtype = llm, dtype
        try:
            self._ask([])
        except Exception as error:  # whatever kind the worker raised, it arrives as another
            raise SourceRefused(
                f"the engine's weights can't be scored with: {first_line(error)}. Use scorer_weights='checkpoint'"
            ) from error

    def score(
        self, samples: Sequence[Sample], *, on_invalid: Literal["fail"], progress: bool = False
    ) -> list[Uncertainty]:
        """As ``Scorer.score``."""
        assert on_invalid == "fail"
        results: list[Uncertainty] = []
        with tqdm(total=len(samples), desc="Scoring", unit="answer", disable=not progress) as bar:
            for start in range(0, len(samples), _AT_A_TIME):
                part = self._ask(samples[start : start + _AT_A_TIME])
                results += part
                bar.update(len(part))
        return results

    def _ask(self, samples: Sequence[Sample]) -> list[Uncertainty]:
        ids = [(list(sample.prompt_ids), list(sample.answer_ids)) for sample in samples]
        (results,) = self._llm.collective_rpc("gnuq_score", args=(ids, {}))
        return [Uncertainty.from_dict(result) for result in results]
