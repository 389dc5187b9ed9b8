"""Where a scorer's tensors come from, behind one small interface: "give the scorer its tensors".

Two sources stand behind it: a checkpoint, read or mapped (``checkpoint``), and vLLM's own tensors (``shared``).
Whoever chooses between them needs nothing else, and whoever scores need not know which one it has:

    weights = source.load()             # once; raises SourceRefused where it can't be exact
    before = source.version()           # before each pass, None while the weights change
    ...                                 # the pass
    source.version() == before          # otherwise the pass saw two sets of weights: repeat it, or fail
"""

from __future__ import annotations

from typing import Protocol

from torch import nn


class SourceRefused(ValueError):  # noqa: N818  (an answer, not a fault: another source may serve)
    """The source can't give exactly the served weights; the message says why, and what to do instead."""


class WeightSource(Protocol):
    """Gives a scorer its tensors."""

    name: str  # "checkpoint" or "shared"; reported on the scorer's state

    def load(self) -> nn.Module:
        """The Hugging Face model, in eval mode, every parameter and buffer in place. Called once.

        Raises:
            SourceRefused: the tensors can't be had, or not exactly.
            CheckpointError: the checkpoint can't be loaded.
        """
        ...

    def version(self) -> int | None:
        """Names the weights as they are now: another number, other weights. None while they are being changed.

        A source whose weights never change always gives 0.
        """
        ...
