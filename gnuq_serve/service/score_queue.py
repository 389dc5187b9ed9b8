"""The answers that wait in the scorer process, and which of them make the next batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from gnuq_serve.service.messages import ScoreRequest

Sender = TypeVar("Sender")


@dataclass(frozen=True, slots=True)
class Entry(Generic[Sender]):
    """One waiting answer and who asked for its score."""

    sender: Sender
    request: ScoreRequest

    @property
    def length(self) -> int:
        """Positions that the pass visits: the last answer token is predicted, never read."""
        return max(1, len(self.request.prompt_ids) + len(self.request.answer_ids) - 1)


class ScoreQueue(Generic[Sender]):
    """First come, first served, in the company of those of similar length that are scored the same way."""

    def __init__(self, max_batch_tokens: int) -> None:
        """An empty queue.

        Args:
            max_batch_tokens: padded positions in one batch; a longer answer gets a batch of its own.
        """
        self._max_batch_tokens = max_batch_tokens
        self._waiting: dict[tuple[Sender, int], Entry[Sender]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sender: Sender, request: ScoreRequest) -> None:
        """Put an answer at the end."""
        self._waiting[sender, request.id] = Entry(sender, request)

    def cancel(self, sender: Sender, request_id: int) -> None:
        """Forget an answer; nothing happens where it is being scored already."""
        self._waiting.pop((sender, request_id), None)

    def next_batch(self, now: float) -> list[Entry[Sender]]:
        """Take out the answer that has waited longest, with others of the most similar length.

        Args:
            now: monotonic seconds; answers whose deadline has passed are dropped, nobody waits for them.
        """
        for key in [key for key, entry in self._waiting.items() if entry.request.deadline <= now]:
            del self._waiting[key]
        if not self._waiting:
            return []
        oldest = next(iter(self._waiting.values()))
        batch: list[Entry[Sender]] = []
        longest = 0
        # The sort is stable: of two that fit as well, the one that has waited longer.
        alike = [entry for entry in self._waiting.values() if entry.request.options == oldest.request.options]
        for entry in sorted(alike, key=lambda entry: abs(entry.length - oldest.length)):
            longest = max(longest, entry.length)
            if batch and (len(batch) + 1) * longest > self._max_batch_tokens:
                break
            batch.append(entry)
        for entry in batch:
            del self._waiting[entry.sender, entry.request.id]
        return batch
