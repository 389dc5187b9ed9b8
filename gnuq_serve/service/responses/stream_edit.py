"""A stream of server-sent events on its way to the client: what only we asked for is taken out again.

vLLM sends one event a chunk, then perhaps one with the usage, then ``[DONE]``.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from gnuq_serve.service.answer import Answer, ThinkingLength
from gnuq_serve.service.requests.request_plan import RequestPlan
from gnuq_serve.service.responses.choice_record import ChoiceRecord
from gnuq_serve.service.responses.response_edit import add_uncertainty, restore

logger = logging.getLogger(__name__)

_END_OF_EVENT = re.compile(rb"\r\n\r\n|\n\n|\r\r")


class EventSplitter:
    """Cuts a byte stream into whole events, however it was chunked."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The events that ``data`` completes, each with the empty line that ends it."""
        self._rest += data
        while (end := _END_OF_EVENT.search(self._rest)) is not None:
            event, self._rest = self._rest[: end.end()], self._rest[end.end() :]
            yield event

    def flush(self) -> bytes:
        """What came after the last whole event."""
        rest, self._rest = self._rest, b""
        return rest


class StreamEditor:
    """One streamed response: edits its events and remembers the answers.

    ``state`` is ``open`` while tokens may come, ``finished`` when the next event is the usage or ``[DONE]``, and
    ``broken`` once vLLM reported an error or sent something unknown: then events pass as they are.
    """

    def __init__(self, plan: RequestPlan) -> None:
        self.state: Literal["open", "finished", "broken"] = "open"
        self._plan = plan
        self._records: dict[int, ChoiceRecord] = {}
        self._finished: list[int] = []
        self._last: dict[str, Any] = {}

    def edit(self, event: bytes) -> bytes | None:
        """The event as the client gets it; None where it exists only because of what we asked for."""
        data = data_of(event)
        if data is None or self.state != "open":
            return event
        if data == b"[DONE]":
            self.state = "finished"
            return event
        try:
            chunk = json.loads(data)
            if "error" in chunk or "choices" not in chunk:
                self.state = "broken"
                return event
            if not chunk["choices"]:
                self.state = "finished"
                return event
            return self._edit_chunk(chunk)
        except Exception:
            logger.exception("an event could not be read; the stream passes as vLLM made it")
            self.state = "broken"
            return event

    @property
    def indexes(self) -> list[int]:
        """The indexes of the choices seen, ascending."""
        return sorted(self._records)

    def newly_finished(self, thinking_length: ThinkingLength | None = None) -> dict[int, Answer | None]:
        """The answers of the choices that have finished since the last call, by their index."""
        finished, self._finished = self._finished, []
        return {index: self._records[index].answer(thinking_length) for index in finished}

    def answers(self, thinking_length: ThinkingLength | None = None) -> list[Answer | None]:
        """The answers of the choices seen, in the order of their index."""
        return [self._records[index].answer(thinking_length) for index in sorted(self._records)]

    def closing_event(self, uncertainties: Sequence[dict[str, Any]], *, mirror: bool) -> bytes:
        """One more chunk, with the uncertainty of every choice.

        Args:
            uncertainties: one for each of ``answers``.
            mirror: put them into ``logprobs`` too.
        """
        choices = []
        for index, uncertainty in zip(sorted(self._records), uncertainties, strict=True):
            content: dict[str, Any] = {"delta": {}} if self._plan.route == "chat" else {"text": ""}
            choice = {"index": index, **content, "logprobs": None, "finish_reason": None}
            tool_call = self._records[index].tool_call
            add_uncertainty(self._plan, choice, uncertainty, tool_call=tool_call, mirror=mirror)
            choices.append(choice)
        kept = ("id", "object", "created", "model", "usage")  # usage: where every chunk has it
        return _event({**{name: self._last[name] for name in kept if name in self._last}, "choices": choices})

    def _edit_chunk(self, chunk: dict[str, Any]) -> bytes | None:
        plan = self._plan
        for choice in chunk["choices"]:
            index = choice["index"]
            if (record := self._records.get(index)) is None:
                record = self._records[index] = ChoiceRecord(plan)
                if plan.echoed:
                    choice["text"] = plan.echo_of(index) + choice["text"]
            record.add_prompt(chunk)
            record.add(choice)
            if choice.get("finish_reason") is not None:
                self._finished.append(index)
        shown = [choice for choice in chunk["choices"] if self._is_shown(choice)]
        self._last = chunk
        if not shown:
            return None
        chunk["choices"] = shown
        restore(plan, chunk, keep_prompt_ids=plan.echo)
        return _event(chunk)

    def _is_shown(self, choice: dict[str, Any]) -> bool:
        """Whether vLLM would have sent this choice's chunk to the client; edits its delta to be as then."""
        delta = choice.get("delta")
        if delta is None or choice.get("token_ids") is None:  # a completion; the role; an echoed message
            return True
        plan, finished = self._plan, choice.get("finish_reason") is not None
        if plan.hide_reasoning:
            if delta.get("content") or delta.get("tool_calls"):
                delta["reasoning"] = None
                return True
            choice["delta"] = {}
            return finished
        # A parser held the tokens back: vLLM then sends a chunk for token ids or logprobs alone.
        return bool(delta) or finished or plan.keep_token_ids or plan.keep_logprobs


def data_of(event: bytes) -> bytes | None:
    """The data of an event; None for a comment."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def _event(chunk: dict[str, Any]) -> bytes:
    text = json.dumps(chunk, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
