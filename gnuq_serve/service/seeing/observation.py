"""What an observer is told of each answer: its final result and where it came from. Text only if logged."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from gnuq_serve.calibration.binding import chat_parts, completion_parts
from gnuq_serve.service.answer import Answer, AnswerText
from gnuq_serve.service.requests.request_plan import DEFAULT_OPTIONS, RequestOptions

logger = logging.getLogger(__name__)

_TRACE_HEADERS = (b"traceparent", b"tracestate")


class RequestContext(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request came from.

    Attributes:
        route: ``chat``, ``completion`` or ``uncertainty`` (a given answer).
        turns: how many messages of the user it has; None: it is no chat.
        api_key_hash: SHA-256 of the API key that it came with, in hexadecimal; None: without one.
        trace_headers: W3C ``traceparent`` and ``tracestate`` where the client sent them.
        parts: what its answers are made with, as a calibration is bound to (`gnuq_serve.calibration.binding`).
    """

    route: str = "uncertainty"
    turns: int | None = None
    api_key_hash: str | None = None
    trace_headers: Mapping[str, str] = {}
    parts: Mapping[str, str] = {}

    @classmethod
    def of(
        cls,
        route: str,
        headers: Iterable[tuple[bytes, bytes]],
        request: Mapping[str, Any],
        sampling_defaults: Mapping[str, Any] | None = None,
    ) -> RequestContext:
        """Read it off an HTTP request.

        Args:
            route: which API.
            headers: the request's, names in lower case, as ASGI has them.
            request: its JSON object.
            sampling_defaults: the server's own, where a request says nothing; None: not known.
        """
        by_name = {name: value.decode("latin-1") for name, value in headers}
        messages = request.get("messages")
        return cls(
            route=route,
            turns=sum(isinstance(one, Mapping) and one.get("role") == "user" for one in messages)
            if isinstance(messages, list)
            else None,
            api_key_hash=_key_hash(by_name.get(b"authorization", "")),
            trace_headers={name.decode(): by_name[name] for name in _TRACE_HEADERS if name in by_name},
            parts=_parts(route, request, sampling_defaults),
        )


NO_CONTEXT = RequestContext()


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """One answer's final result: scored, skipped or failed; a pending one is told when it has come.

    Attributes:
        result: the uncertainty in JSON form, as the client gets it. Not to be changed.
        options: what the client asked of the score.
        context: where the request came from.
        finish_reason: vLLM's (``stop``, ``length``, ``tool_calls``, …); None: not known.
        prompt_tokens: length of the prompt; None: not known.
        answer_tokens: how many tokens the model wrote, thinking included; None: not known.
        engine_log_probability: vLLM's own ``l`` of the scored span; None where it can't be compared.
        pass_seconds: how long the gradient pass of its batch took; None: there was none.
        ended: seconds since the epoch.
        text: question and answer where the operator wants them logged (``log_text``); else None.
    """

    result: Mapping[str, Any]
    options: RequestOptions = DEFAULT_OPTIONS
    context: RequestContext = NO_CONTEXT
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    engine_log_probability: float | None = None
    pass_seconds: float | None = None
    ended: float = msgspec.field(default_factory=time.time)
    text: AnswerText | None = None

    @classmethod
    def of(
        cls,
        result: Mapping[str, Any],
        answer: Answer | None,
        options: RequestOptions,
        context: RequestContext,
        *,
        comparable: bool = True,
        pass_seconds: float | None = None,
    ) -> Observation:
        """What there is to tell of a result.

        Args:
            result: the uncertainty in JSON form.
            answer: what was scored; None: unknown.
            options: what the client asked of the score.
            context: where the request came from.
            comparable: the engine's log-probabilities are the plain model's.
            pass_seconds: time of the gradient pass.
        """
        if answer is None:
            return cls(result=result, options=options, context=context)
        span = answer.answer_span
        return cls(
            result=result,
            options=options,
            context=context,
            finish_reason=answer.finish_reason,
            prompt_tokens=len(answer.prompt_ids),
            answer_tokens=len(answer.answer_ids),
            engine_log_probability=span.log_probability if span is not None and comparable else None,
            pass_seconds=pass_seconds,
            text=answer.text,
        )


Observer = Callable[[Observation], None]


class Observers:
    """Who is told; a failure of one costs neither the answer nor the others, and is logged once."""

    def __init__(self) -> None:
        self._observers: list[Observer] = []
        self._failed: set[int] = set()

    def append(self, observer: Observer) -> None:
        """Tell ``observer`` too; it runs on the event loop, so it must be quick and never wait."""
        self._observers.append(observer)

    def tell(self, observation: Observation) -> None:
        """Tell all of one result."""
        for number, observer in enumerate(self._observers):
            try:
                observer(observation)
            except Exception:
                if number not in self._failed:
                    self._failed.add(number)
                    logger.exception("an observer of scores fails; said once: %r", observer)


def _parts(route: str, request: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> dict[str, str]:
    if route == "chat":
        return chat_parts(request, defaults)
    if route == "completion":
        return completion_parts(request, defaults)
    if "messages" not in request:
        return {}
    parts = chat_parts(request, None)
    del parts["sampling"]  # nobody knows how a given answer was drawn
    return parts


def _key_hash(authorization: str) -> str | None:
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer" or not key:
        return None
    return hashlib.sha256(key.encode("latin-1", "replace")).hexdigest()
