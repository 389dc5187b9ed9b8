"""Where ChatGnuq finds the score in what LangChain's OpenAI client made of a response."""

from __future__ import annotations

from typing import Any

from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk

from langchain_gnuq.deciding import Context, Decider, turns_of


def take_score(generation: ChatGeneration, own: Any) -> None:
    """From the choice, or the logprobs that mirror it, to the message; the logprobs stay as vLLM meant them."""
    info = generation.generation_info or {}
    logprobs = info.get("logprobs")
    mirrored = None
    if isinstance(logprobs, dict) and "uncertainty" in logprobs:
        kept = {name: value for name, value in logprobs.items() if name != "uncertainty"}
        mirrored = logprobs["uncertainty"]
        if any(value is not None for value in kept.values()):
            info["logprobs"] = kept
        elif isinstance(generation, ChatGenerationChunk):
            del info["logprobs"]
        else:
            info["logprobs"] = None
    uncertainty = mirrored if own is None else own
    if uncertainty is not None:
        generation.message.response_metadata["uncertainty"] = uncertainty


class EndOfStream:
    """Takes the score out of a stream and makes the last chunk of it, which alone carries it."""

    def __init__(self, messages: list[BaseMessage], decider: Decider) -> None:
        self._context = Context(turns=turns_of(messages))
        self._decider = decider
        self._metadata: dict[str, Any] = {}
        self._needed = False

    def passes(self, chunk: ChatGenerationChunk) -> bool:
        """Read a chunk; False where it held nothing but the score."""
        message, info = chunk.message, chunk.generation_info or {}
        if not isinstance(message, AIMessageChunk):
            return True
        self._needed = not message.chunk_position
        self._context.finish_reason = info.get("finish_reason") or self._context.finish_reason
        if message.usage_metadata:
            self._context.prompt_tokens = message.usage_metadata.get("input_tokens")
        sent = message.response_metadata.pop("uncertainty", None)
        if sent is None:
            return True
        self._metadata["uncertainty"] = sent
        return bool(message.content or message.tool_call_chunks or message.usage_metadata or info)

    def chunk(self) -> ChatGenerationChunk | None:
        """The last chunk; None for a stream without chunks, or one whose last chunk has gone."""
        if not self._needed:
            return None
        self._decider.annotate(self._metadata, self._context)
        message = AIMessageChunk(content="", response_metadata=self._metadata, chunk_position="last")
        return ChatGenerationChunk(message=message)
