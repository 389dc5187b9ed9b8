"""What vLLM says of one choice, whole or chunk by chunk, put together to the answer that is scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gnuq_serve.service.answer import Answer, AnswerText, ThinkingLength
from gnuq_serve.service.requests.request_plan import RequestPlan

_LOST_BOUNDARY = "where the thinking ends was not found: thinking and answer are scored as one"


class ChoiceRecord:
    """Token ids, logprobs and kinds of content of one choice."""

    def __init__(self, plan: RequestPlan) -> None:
        self._plan = plan
        self._prompt_ids: list[int] | None = None
        self._answer_ids: list[int] | None = None
        self._logprobs: list[float] | None = [] if plan.comparable else None
        self._has_reasoning = False
        self._has_content = False
        self._finish_reason: str | None = None
        self._index = 0
        self._text: list[str] = []
        self.tool_call = False

    def add_prompt(self, holder: Mapping[str, Any]) -> None:
        """Read the prompt's token ids where ``holder`` (the response, a chunk or a choice) has them."""
        if (ids := holder.get("prompt_token_ids")) is not None:
            self._prompt_ids = ids

    def add(self, choice: Mapping[str, Any]) -> None:
        """Read a choice of a response or of a chunk."""
        self.add_prompt(choice)
        message = choice.get("message") or choice.get("delta") or {}
        self.tool_call |= bool(message.get("tool_calls"))
        self._index = choice.get("index") or 0
        if self._plan.keep_text and isinstance(text := message.get("content") or choice.get("text"), str):
            self._text.append(text)
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        ids = choice.get("token_ids")
        if ids is None:  # not asked for; the role; the start of an assistant message that is continued
            return
        if self._answer_ids is None:
            self._answer_ids = []
        self._answer_ids += ids
        self._add_logprobs(choice.get("logprobs"), len(ids))
        self._has_reasoning |= bool(message.get("reasoning") or message.get("reasoning_content"))
        self._has_content |= bool(message.get("content") or choice.get("text") or message.get("tool_calls"))

    def answer(self, thinking_length: ThinkingLength | None = None) -> Answer | None:
        """The answer as far as it was read; None where vLLM gave no token ids.

        Args:
            thinking_length: finds the end of the thinking, where the server has a reasoning parser.
        """
        if self._prompt_ids is None or self._answer_ids is None:
            return None
        thinking = self._thinking(self._answer_ids, thinking_length)
        return Answer(
            self._prompt_ids,
            self._answer_ids,
            self._logprobs if self._logprobs and len(self._logprobs) == len(self._answer_ids) else None,
            tool_call=self.tool_call,
            grammar=self._plan.grammar,
            thinking=thinking or 0,
            warnings=(_LOST_BOUNDARY,) if thinking is None else (),
            finish_reason=self._finish_reason,
            text=self._words(),
            adapter=self._plan.adapter,
        )

    def _words(self) -> AnswerText | None:
        question = self._plan.question_of(self._index) if self._plan.keep_text else None
        return None if question is None else AnswerText(question, "".join(self._text))

    def _thinking(self, answer_ids: list[int], thinking_length: ThinkingLength | None) -> int | None:
        if not self._has_reasoning:
            return 0
        if not self._has_content:
            return len(answer_ids)
        if thinking_length is None:
            return None
        return thinking_length(answer_ids, self._plan.template_options)

    def _add_logprobs(self, logprobs: Mapping[str, Any] | None, tokens: int) -> None:
        if self._logprobs is None:
            return
        values = _token_logprobs(logprobs) or []
        if self._plan.echo:  # those of the prompt come first
            values = values[max(0, len(values) - tokens) :]
        if len(values) != tokens or any(value is None for value in values):
            self._logprobs = None
        else:
            self._logprobs += [float(value) for value in values if value is not None]


def _token_logprobs(logprobs: Mapping[str, Any] | None) -> list[float | None] | None:
    if not logprobs:
        return None
    if (content := logprobs.get("content")) is not None:  # chat
        return [token["logprob"] for token in content]
    values: list[float | None] | None = logprobs.get("token_logprobs")  # completions
    return values
