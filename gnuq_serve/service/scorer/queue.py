"""The answers that wait in the scorer process, and which of them make the next batch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from gnuq_serve.score_options import ScoreOptions
from gnuq_serve.service.scorer.messages import OnOverload, ScoreRequest

Sender = TypeVar("Sender")


@dataclass(frozen=True, slots=True)
class Entry(Generic[Sender]):
    """One waiting answer and who asked for its score."""

    sender: Sender
    request: ScoreRequest

    @property
    def way(self) -> tuple[ScoreOptions, str | None]:
        """What all answers of a batch have in common."""
        return self.request.options, self.request.adapter

    @property
    def length(self) -> int:
        """Positions that the pass visits: the last answer token is predicted, never read."""
        return max(1, len(self.request.prompt_ids) + len(self.request.answer_ids) - 1)


class ScoreQueue(Generic[Sender]):
    """First come, first served, in the company of those of similar length that are scored the same way."""

    def __init__(self, max_batch_tokens: int, *, max_queue: int = 256, on_overload: OnOverload = "skip") -> None:
        """An empty queue.

        Args:
            max_batch_tokens: padded positions in one batch; a longer answer gets a batch of its own.
            max_queue: places, for answers that wait and for those of the batch that was taken out last.
            on_overload: what happens to one more: ``"skip"`` refuses it, ``"wait"`` lets it wait for a place.
        """
        self._max_batch_tokens = max_batch_tokens
        self._max_queue, self._on_overload = max_queue, on_overload
        self._in_hand = 0
        self._waiting: dict[tuple[Sender, int], Entry[Sender]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sender: Sender, request: ScoreRequest) -> bool:
        """Put an answer at the end; false where there is no place for it."""
        if self._on_overload == "skip" and len(self) + self._in_hand >= self._max_queue:
            return False
        self._waiting[sender, request.id] = Entry(sender, request)
        return True

    def cancel(self, sender: Sender, request_id: int) -> None:
        """Forget an answer; nothing happens where it is being scored already."""
        self._waiting.pop((sender, request_id), None)

    def done(self) -> None:
        """The batch that was taken out last is scored: its places are free."""
        self._in_hand = 0

    def next_batch(self, now: float) -> list[Entry[Sender]]:
        """Take out the answer that has waited longest, with others of the most similar length.

        Args:
            now: monotonic seconds; answers whose deadline has passed are dropped, nobody waits for them.

        The batch taken before counts as done.
        """
        self.done()
        for key in [key for key, entry in self._waiting.items() if entry.request.deadline <= now]:
            del self._waiting[key]
        if not self._waiting:
            return []
        oldest = next(iter(self._waiting.values()))
        batch: list[Entry[Sender]] = []
        longest = 0
        # The sort is stable: of two that fit as well, the one that has waited longer.
        in_place = islice(self._waiting.values(), self._max_queue)
        alike = [entry for entry in in_place if entry.way == oldest.way]
        for entry in sorted(alike, key=lambda entry: abs(entry.length - oldest.length)):
            longest = max(longest, entry.length)
            if batch and (len(batch) + 1) * longest > self._max_batch_tokens:
                break
            batch.append(entry)
        for entry in batch:
            del self._waiting[entry.sender, entry.request.id]
        self._in_hand = len(batch)
        return batch
