"""One answer as token ids, and the spans of it that are scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# (answer ids, what the request hands to the chat template) -> how many of the ids are thinking, its end marker
# included; None where that can't be told.
ThinkingLength = Callable[[Sequence[int], Mapping[str, object]], "int | None"]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens to score, given the tokens before them.

    Attributes:
        prompt_ids: what stood before.
        answer_ids: the tokens of the span.
        log_probability: the engine's ``l`` of the span; None where it can't be compared.
    """

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    log_probability: float | None = None


@dataclass(frozen=True, slots=True)
class AnswerText:
    """Question and answer as text, for the log of scores where the operator wants them there.

    Attributes:
        question: the prompt, or the messages of a chat.
        answer: what the model wrote, thinking left out.
    """

    question: str | Sequence[Mapping[str, Any]]
    answer: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice of a response, as token ids.

    Attributes:
        prompt_ids: what the model read.
        answer_ids: what it wrote, end-of-turn token included.
        logprobs: the engine's log-probability of each answer token; None where they can't be compared.
        tool_call: it calls a tool.
        grammar: a grammar forced some of its tokens.
        thinking: how many of ``answer_ids`` are thinking.
        warnings: what the reader of the score should know.
        finish_reason: why it ended, as vLLM says; None: not known.
        text: in words; None unless it is wanted, and where the prompt is no text.
        adapter: where the LoRA adapter is that wrote it; None: the base model did.
    """

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    logprobs: Sequence[float] | None = None
    tool_call: bool = False
    grammar: bool = False
    thinking: int = 0
    warnings: tuple[str, ...] = ()
    finish_reason: str | None = None
    text: AnswerText | None = None
    adapter: str | None = None

    @property
    def answer_span(self) -> Span | None:
        """What follows the thinking; None where nothing does."""
        if self.thinking >= len(self.answer_ids) > 0:
            return None
        before = [*self.prompt_ids, *self.answer_ids[: self.thinking]] if self.thinking else self.prompt_ids
        return Span(before, self.answer_ids[self.thinking :], self._sum(self.thinking, None))

    @property
    def thinking_span(self) -> Span | None:
        """The thinking; None where there is none."""
        if self.thinking == 0:
            return None
        return Span(self.prompt_ids, self.answer_ids[: self.thinking], self._sum(0, self.thinking))

    def _sum(self, start: int, end: int | None) -> float | None:
        if not self.logprobs or len(self.logprobs) != len(self.answer_ids):
            return None
        return math.fsum(self.logprobs[start:end])
