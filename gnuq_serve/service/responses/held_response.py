"""Responses on their way out where something is gated: nothing of an answer leaves before it is judged.

Whatever is not understood (another media type, a stream without an end, an error of ours) counts as an answer
without a score, and goes out as vLLM made it, or not at all, as ``on_failure`` says.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from starlette.types import Message, Send

from gnuq_serve.service.hang_up import ClientGoneError
from gnuq_serve.service.http_messages import error_object, json_bytes, with_length
from gnuq_serve.service.responses.accounting import Accounting
from gnuq_serve.service.responses.response_edit import attach, read_answers
from gnuq_serve.service.responses.stream_edit import EventSplitter, StreamEditor, data_of
from gnuq_serve.service.responses.whole_response import WholeResponse
from gnuq_serve.service.responses.withhold import marked, withhold, withhold_events, without_choices

logger = logging.getLogger(__name__)

_NOT_JUDGED = "the answer could not be judged, and this server lets no such answer through (on_failure: closed)"
_DONE = b"data: [DONE]\n\n"
# A comment, so that whoever stands between does not take a held stream for a dead one.
_WAITING = b": the answer is held back until it is scored\n\n"
_WAITING_SECONDS = 5.0


class HeldWhole(WholeResponse):
    """Holds back a JSON response, puts the scores in, and replaces the answers that may not go out."""

    async def _finish(self, body: bytes) -> None:
        accounting, results = self._accounting, None
        try:
            response = json.loads(body)
            if response is None:  # the client has hung up; vLLM gave up the answer
                return
            answers = read_answers(accounting.plan, response, accounting.thinking_length)
            results = await accounting.of(answers)
            await self._out(self._edited(response, results))
        except ClientGoneError:
            return
        except Exception:
            logger.exception("a response could not be judged")
            if accounting.passes_unjudged(results):
                await self._out(body)
            else:
                await refuse(self._start, self._send)

    def _edited(self, response: dict[str, Any], results: Sequence[dict[str, Any]]) -> bytes:
        accounting = self._accounting
        plan, mirror = accounting.plan, accounting.mirror
        attach(plan, response, results, mirror=mirror)
        verdicts = accounting.verdicts(results)
        if any(verdicts):
            text = accounting.settings.abstain_text
            response = withhold(plan, response, results, verdicts, text=text, mirror=mirror)
        return json_bytes(response)


class HeldStream:
    """Holds back a stream's events until all its answers are judged."""

    def __init__(self, accounting: Accounting, send: Send) -> None:
        self._accounting = accounting
        self._send = send
        self._splitter = EventSplitter()
        self._editor = StreamEditor(accounting.plan)
        self._tokens: list[bytes] = []  # edited events, up to the usage
        self._tail: list[bytes] = []  # the usage
        self._odd: list[bytes] = []  # from the first event on that is none of these, as vLLM made them
        self._error: dict[str, Any] | None = None  # vLLM's own, where it broke off
        self._over = False
        self._last_sent = time.monotonic()

    async def __call__(self, message: Message) -> None:
        """Take one message of the response; those of unknown types are dropped."""
        if message["type"] == "http.response.start":
            await self._send(message)
        elif message["type"] == "http.response.body" and not self._over:
            for event in self._splitter.feed(message.get("body", b"")):
                self._take(event)
            if not message.get("more_body"):
                self._over = True
                if rest := self._splitter.flush():
                    self._odd.append(rest)
                await self._finish()
            elif time.monotonic() - self._last_sent > _WAITING_SECONDS:
                await self._pass_on(_WAITING)

    def _take(self, event: bytes) -> None:
        data = data_of(event)
        if data is None or (data == b"[DONE]" and not self._odd):  # a comment; our own end is put behind
            if data is not None:
                self._editor.edit(event)
            return
        was_open = self._editor.state == "open"
        edited = self._editor.edit(event) if was_open else event
        self._begin()
        state = self._editor.state
        if self._odd or state == "broken" or (not was_open and not _is_usage(data)):
            self._odd.append(event)
            self._error = self._error or _error_in(data)
        elif edited is not None:
            (self._tokens if state == "open" else self._tail).append(edited)

    def _begin(self) -> None:
        """Have the choices scored that have finished."""
        try:
            self._accounting.begin(self._editor.newly_finished(self._accounting.thinking_length))
        except Exception:
            logger.exception("a choice is not scored before the others have finished")

    async def _finish(self) -> None:
        accounting, results = self._accounting, None
        try:
            if self._odd or self._editor.state != "finished":
                await self._unjudged(None)
                return
            answers = self._editor.answers(accounting.thinking_length)
            results = await accounting.of(answers, self._editor.indexes)
            events = self._judged(results) if answers else self._tail
        except ClientGoneError:
            return
        except Exception:
            logger.exception("a stream could not be judged")
            await self._unjudged(results)
            return
        await self._end([*events, _DONE])

    def _judged(self, results: Sequence[dict[str, Any]]) -> list[bytes]:
        accounting = self._accounting
        verdicts = accounting.verdicts(results)
        shown = [marked(result, why) for result, why in zip(results, verdicts, strict=True)]
        closing = self._editor.closing_event(shown, mirror=accounting.mirror)
        withheld = [index for index, why in zip(self._editor.indexes, verdicts, strict=True) if why is not None]
        if not withheld:
            return [*self._tokens, closing, *self._tail]
        text = accounting.settings.abstain_text
        tokens = withhold_events(accounting.plan.route, self._tokens, withheld, text)
        return [*tokens, closing, *map(without_choices, self._tail)]

    async def _unjudged(self, results: Sequence[dict[str, Any]] | None) -> None:
        if self._accounting.passes_unjudged(results):
            whole = self._editor.state == "finished" and not self._odd
            await self._end([*self._tokens, *self._tail, *self._odd, *([_DONE] if whole else [])])
            return
        error = self._error or {"error": error_object(HTTPStatus.INTERNAL_SERVER_ERROR, _NOT_JUDGED)}
        await self._end([b"data: " + json_bytes(error) + b"\n\n", _DONE])

    async def _end(self, events: Sequence[bytes]) -> None:
        for event in events:
            await self._pass_on(event)
        await self._send({"type": "http.response.body", "body": b""})

    async def _pass_on(self, event: bytes) -> None:
        self._last_sent = time.monotonic()
        await self._send({"type": "http.response.body", "body": event, "more_body": True})


class HeldUnknown:
    """A successful response that is neither JSON nor a stream of events: it carries no score."""

    def __init__(self, accounting: Accounting, send: Send) -> None:
        self._passes = accounting.passes_unjudged(None)
        self._send = send

    async def __call__(self, message: Message) -> None:
        """Take one message of the response."""
        if self._passes:
            await self._send(message)
        elif message["type"] == "http.response.start":
            await refuse(message, self._send)


async def refuse(start: Message, send: Send) -> None:
    """An error in place of a response.

    Args:
        start: the response's; its headers stay but for those of its body.
        send: the connection's.
    """
    body = json_bytes({"error": error_object(HTTPStatus.INTERNAL_SERVER_ERROR, _NOT_JUDGED)})
    of_the_body = (b"content-type", b"content-encoding", b"transfer-encoding", b"etag")
    headers = [(name, value) for name, value in start["headers"] if name.lower() not in of_the_body]
    headers = [*with_length(headers, len(body)), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _is_usage(data: bytes) -> bool:
    """An event after the last token that holds no answer."""
    try:
        return bool(json.loads(data).get("choices") == [])
    except (ValueError, AttributeError):
        return False


def _error_in(data: bytes) -> dict[str, Any] | None:
    try:
        chunk = json.loads(data)
    except ValueError:
        return None
    error = chunk.get("error") if isinstance(chunk, dict) else None
    return {"error": error} if error else None
