"""Passes over weights that somebody else may change at any time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from gnuq_serve.weights.source import WeightSource

_TRIES = 3
_WAIT_SECONDS, _LOOK_SECONDS = 5.0, 0.05

Result = TypeVar("Result")


class ChangingWeightsError(RuntimeError):
    """The weights would not stay the same for as long as a pass takes."""


class SteadyPasses:
    """Runs passes such that each sees one set of weights."""

    def __init__(self, source: WeightSource, forget: Callable[[], object]) -> None:
        """Nothing is run yet.

        Args:
            source: of the weights.
            forget: called before the first pass over other weights than those of the last one.
        """
        self._source, self._forget = source, forget
        self._seen: int | None = None  # what was learned before may be of other weights

    def run(self, work: Callable[[], Result]) -> Result:
        """What some work over the weights gives; it is done again where they changed meanwhile.

        Raises:
            ChangingWeightsError: they changed each time, or are being changed for too long.
        """
        for _ in range(_TRIES):
            version = self._settled()
            if version != self._seen:
                self._forget()
                self._seen = version
            result = work()
            if self._source.version() == version:
                return result
            self._seen = None
        raise ChangingWeightsError(f"the engine's weights changed during each of {_TRIES} passes")

    def _settled(self) -> int:
        until = time.monotonic() + _WAIT_SECONDS
        while (version := self._source.version()) is None:
            if time.monotonic() > until:
                raise ChangingWeightsError(
                    "the engine's weights are being changed, or a change of them failed half-way"
                )
            time.sleep(_LOOK_SECONDS)
        return version
