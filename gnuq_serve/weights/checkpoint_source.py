"""The source ``checkpoint``: a copy of the weights, read or mapped from a checkpoint's files."""

from __future__ import annotations

from typing import Any

from torch import nn

from gnuq_serve.weights.checkpoint import load_checkpoint


class CheckpointSource:
    """A ``WeightSource`` whose weights never change."""

    name = "checkpoint"

    def __init__(self, model: str, **options: Any) -> None:
        """Nothing is loaded yet.

        Args:
            model: folder or hub name.
            options: as for ``load_checkpoint``.
        """
        self._model, self._options = model, options

    def load(self) -> nn.Module:
        """See ``WeightSource``."""
        return load_checkpoint(self._model, **self._options)

    def version(self) -> int:
        """See ``WeightSource``."""
        return 0
