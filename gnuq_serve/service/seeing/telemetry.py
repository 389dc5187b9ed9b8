"""A span for each answer's score, where vLLM's tracing is on. Knows nothing of OpenTelemetry until then.

vLLM's own span of a request, ``llm_request``, and ours have the same parent: the span that the client names in
its ``traceparent`` header. Without such a header ours is a trace of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gnuq_serve.service.seeing.observation import Observation, Observer
from gnuq_serve.service.seeing.reasons import reason_code, warning_code

SPAN_NAME = "gnuq.score"

_NANOSECONDS = 1_000_000_000
_NO_ATTRIBUTES = {"warnings", "trace", "thinking"}


def span_observer() -> Observer:
    """An observer that makes a span of each result, by the process's tracer provider (vLLM sets it).

    Raises:
        ImportError: OpenTelemetry is not installed.
    """
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer = trace.get_tracer("gnuq_serve")
    propagator = TraceContextTextMapPropagator()

    def observe(observation: Observation) -> None:
        seconds = observation.result.get("seconds") or 0.0
        span = tracer.start_span(
            SPAN_NAME,
            # An empty context, not the current one: nothing of ours is around this answer.
            context=propagator.extract(observation.context.trace_headers, context=Context()),
            start_time=int((observation.ended - seconds) * _NANOSECONDS),
            attributes=attributes(observation),
        )
        if observation.result["status"] == "failed":
            span.set_status(trace.StatusCode.ERROR, observation.result.get("reason"))
        span.end(int(observation.ended * _NANOSECONDS))

    return observe


def attributes(observation: Observation) -> dict[str, Any]:
    """What there is to say of a result, without nulls: ``gnuq.…``, and counts of tokens as vLLM names them."""
    result = observation.result
    found = {f"gnuq.{name}": value for name, value in _flat(result) if value is not None}
    more = {
        "gnuq.route": observation.context.route,
        "gnuq.reason_code": reason_code(result.get("reason")) or None,
        "gnuq.warnings": sorted(map(warning_code, result.get("warnings") or ())) or None,
        "gnuq.finish_reason": observation.finish_reason,
        "gnuq.engine_log_probability": observation.engine_log_probability,
        "gnuq.pass_seconds": observation.pass_seconds,
        "gen_ai.usage.prompt_tokens": observation.prompt_tokens,
        "gen_ai.usage.completion_tokens": observation.answer_tokens,
    }
    return found | {name: value for name, value in more.items() if value is not None}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if name in _NO_ATTRIBUTES:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float | str | None):
            yield f"{prefix}{name}", value
