"""Which samples go into one pass: those of similar length, as many as fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gnuq_serve.gradnorm.batch import Ids

# What one more pass costs, in positions of a pass: less padding than that is cheaper than splitting. On a CPU as
# measured (SmolLM2); on a GPU, which short passes leave idle, an estimate.
PASS_OVERHEAD = {"cpu": 32, "cuda": 2048}


@dataclass(frozen=True, slots=True)
class Size:
    """What the cost of a batch depends on.

    Attributes:
        samples: how many.
        longest: positions that the pass visits for its longest sample.
        filled: visited positions, padding left out.
        answer_tokens: of all samples.
        prefix: for ``answer_only``, positions before the visited ones, the same for all samples.
        prompts: how many different ones.
    """

    samples: int = 0
    longest: int = 0
    filled: int = 0
    answer_tokens: int = 0
    prefix: int = 0
    prompts: int = 0

    @property
    def padded(self) -> int:
        """Positions that the pass visits, padding among them."""
        return self.samples * self.longest

    @property
    def padding(self) -> int:
        """Positions without a token."""
        return self.padded - self.filled

    def plus(self, sample: Ids, answer_only: bool, *, new_prompt: bool = True) -> Size:
        """The size with one more sample."""
        prompt, answer = sample
        prefix = len(prompt) - 1 if answer_only else 0
        visited = len(prompt) - 1 - prefix + len(answer)
        return Size(
            self.samples + 1,
            max(self.longest, visited),
            self.filled + visited,
            self.answer_tokens + len(answer),
            prefix,
            self.prompts + new_prompt,
        )

    @classmethod
    def of(cls, samples: Sequence[Ids], answer_only: bool) -> Size:
        """The size of a batch of these samples."""
        size = cls()
        seen: set[tuple[int, ...]] = set()
        for sample in samples:
            prompt = tuple(sample[0])
            size = size.plus(sample, answer_only, new_prompt=prompt not in seen)
            seen.add(prompt)
        return size


def batches(
    samples: Sequence[Ids], answer_only: bool, overhead: int, fits: Callable[[Size], bool]
) -> Iterator[list[int]]:
    """Indices of the samples, batch by batch, with at most ``overhead`` positions of padding.

    A sample that does not fit even alone is a batch of its own.

    The longest samples come first, so that memory runs out at once where it will. In ``answer_only`` a batch has
    prompts of one length (keys and values stand side by side unpadded) and equal prompts are neighbours; short
    prompts come first, for the next turn of a conversation goes on from them.
    """

    def key(i: int) -> tuple[int, tuple[int, ...], int]:
        prompt, answer = samples[i]
        if answer_only:
            return len(prompt), tuple(prompt), -len(answer)
        return 0, (), -len(prompt) - len(answer)

    batch: list[int] = []
    size = Size()
    for i in sorted(range(len(samples)), key=key):
        last = samples[batch[-1]] if batch else None
        new_prompt = last is None or tuple(samples[i][0]) != tuple(last[0])
        larger = size.plus(samples[i], answer_only, new_prompt=new_prompt)
        split = last is not None and (
            (answer_only and len(samples[i][0]) != len(last[0])) or larger.padding > overhead or not fits(larger)
        )
        if split:
            yield batch
            batch, larger = [], Size().plus(samples[i], answer_only)
        batch, size = [*batch, i], larger
    if batch:
        yield batch
