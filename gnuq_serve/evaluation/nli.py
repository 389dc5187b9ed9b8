"""Natural language inference: two answers mean the same where each entails the other, given the question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gnuq_serve.evaluation.clustering import clustered
from gnuq_serve.evaluation.steps.base import Result


class Entailment:
    """A sequence classifier with a class for entailment.

    Args:
        folder: its checkpoint.

    Raises:
        ValueError: no class of it is called entailment.
        OSError: no checkpoint there.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from gnuq_serve.weights.room import weight_bytes

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        labels = {int(at): str(label).lower() for at, label in self._model.config.id2label.items()}
        found = [at for at, label in labels.items() if label.startswith("entail")]
        if len(found) != 1:
            raise ValueError(f"--nli {folder}: its classes are {', '.join(labels.values())}; none is entailment")
        self._entails = found[0]
        self.bytes = weight_bytes(self._model)

    def compare(self, question: str, answer: str, samples: Sequence[str]) -> Result:
        """Clusters of samples, and which agree with the answer."""
        known: dict[tuple[str, str], bool] = {}

        def entails(one: str, other: str) -> bool:
            if (one, other) not in known:
                known[one, other] = self._entail(f"{question} {one}", f"{question} {other}")
            return known[one, other]

        return clustered(answer, samples, lambda a, b: a == b or (entails(a, b) and entails(b, a)))

    def _entail(self, premise: str, hypothesis: str) -> bool:
        import torch

        batch = self._tokenizer(premise, hypothesis, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            logits = self._model(**batch).logits[0]
        return int(logits.argmax()) == self._entails
