"""The uncertainties of past runs by their ids, for values that an output parser drops."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TypeVar
from uuid import UUID

from gnuq_serve.uncertainty import Uncertainty

_Value = TypeVar("_Value")


class RunRegistry:
    """Uncertainties by run id: of a model's run its first answer, of a chain around it the latest one.

    Chains are known by the id of their direct child, or through `started` further up. Safe to use from several
    threads.

    Args:
        limit: how many runs are known; the oldest is forgotten first.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._found: OrderedDict[UUID, Uncertainty] = OrderedDict()
        self._parents: OrderedDict[UUID, UUID] = OrderedDict()
        self._lock = threading.Lock()

    def started(self, run_id: UUID, parent_run_id: UUID | None) -> None:
        """A chain's run has begun inside of another."""
        if parent_run_id is not None:
            with self._lock:
                bounded_put(self._parents, run_id, parent_run_id, self._limit)

    def ended(self, run_id: UUID) -> None:
        """A chain's run is over: it starts no more runs."""
        with self._lock:
            self._parents.pop(run_id, None)

    def remember(self, run_id: UUID, parent_run_id: UUID | None, uncertainty: Uncertainty) -> None:
        """Keep it for the model's run and for every run around it."""
        with self._lock:
            bounded_put(self._found, run_id, uncertainty, self._limit)
            while parent_run_id is not None:
                bounded_put(self._found, parent_run_id, uncertainty, self._limit)
                parent_run_id = self._parents.get(parent_run_id)

    def get(self, run_id: UUID | str) -> Uncertainty | None:
        """What is known of a run, or None.

        Raises:
            ValueError: a string that is no run id.
        """
        key = UUID(run_id) if isinstance(run_id, str) else run_id
        with self._lock:
            return self._found.get(key)


def bounded_put(entries: OrderedDict[UUID, _Value], key: UUID, value: _Value, limit: int) -> None:
    """Put it last, and let the first go while there are more than ``limit``."""
    entries[key] = value
    entries.move_to_end(key)
    while len(entries) > limit:
        entries.popitem(last=False)
