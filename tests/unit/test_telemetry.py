import subprocess
import sys
from concurrent import futures

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gnuq_serve.service.seeing.observation import Observation, RequestContext
from gnuq_serve.service.seeing.telemetry import span_observer
from gnuq_serve.uncertainty import Normalized, Signals, Trace, Uncertainty

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SCORED = Uncertainty(
    id="unc-1",
    status="scored",
    mode="exact",
    tokens=2,
    log_probability=-1.5,
    log_grad_norm_sq=9.5,
    normalized=Normalized(probability=0.5),
    signals=Signals(max_entropy=0.25),
    trace=Trace(entropy=(1.0,), aleatoric=(1.0,), epistemic=(1.0,)),
    warnings=("a grammar forced tokens: …",),
    p_correct=0.75,
    seconds=2.0,
)


def told(result=SCORED, flags="01", **facts):
    context = RequestContext(route="chat", trace_headers={"traceparent": f"00-{TRACE}-{PARENT}-{flags}"})
    return Observation(result=result.to_dict(), ended=1000.0, **{"context": context, **facts})


@pytest.fixture
def provider(monkeypatch):
    """A tracer provider in the process, as vLLM sets one up; it is the process's only for this test."""
    provider = TracerProvider()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield provider
    provider.shutdown()


@pytest.fixture
def spans(provider):
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter.get_finished_spans


def test_a_span_carries_the_numbers(spans):
    span_observer()(told(finish_reason="stop", prompt_tokens=5, answer_tokens=2, engine_log_probability=-1.25))
    (span,) = spans()
    assert span.name == "gnuq.score"
    assert (span.start_time, span.end_time) == (998_000_000_000, 1_000_000_000_000)
    assert dict(span.attributes) == {
        "gnuq.id": "unc-1",
        "gnuq.status": "scored",
        "gnuq.mode": "exact",
        "gnuq.route": "chat",
        "gnuq.tokens": 2,
        "gnuq.log_probability": -1.5,
        "gnuq.log_grad_norm_sq": 9.5,
        "gnuq.normalized.probability": 0.5,
        "gnuq.signals.max_entropy": 0.25,
        "gnuq.p_correct": 0.75,
        "gnuq.tool_call": False,
        "gnuq.warnings": ("grammar",),
        "gnuq.seconds": 2.0,
        "gnuq.finish_reason": "stop",
        "gnuq.engine_log_probability": -1.25,
        "gen_ai.usage.prompt_tokens": 5,
        "gen_ai.usage.completion_tokens": 2,
    }


def test_the_span_belongs_to_the_clients_trace(spans):
    span_observer()(told())
    (span,) = spans()
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT


def test_without_a_header_it_is_a_trace_of_its_own_even_within_another_span(provider, spans):
    with provider.get_tracer("other").start_as_current_span("outer") as outer:
        span_observer()(told(context=RequestContext()))
    span = next(one for one in spans() if one.name == "gnuq.score")
    assert span.parent is None
    assert span.context.trace_id != outer.get_span_context().trace_id


def test_a_client_that_does_not_sample_gets_no_span(spans):
    span_observer()(told(flags="00"))
    assert spans() == ()


def test_a_failure_is_an_error(spans):
    span_observer()(told(Uncertainty.failed("the scorer process died while it held this answer")))
    (span,) = spans()
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.status.description == "the scorer process died while it held this answer"
    assert span.attributes["gnuq.reason_code"] == "scorer_died"
    assert span.start_time == span.end_time


def test_the_span_reaches_a_receiver(provider):
    """Over OTLP and gRPC, as vLLM exports."""
    received = []

    class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request, context):
            received.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Receiver(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        provider.add_span_processor(
            SimpleSpanProcessor(OTLPSpanExporter(f"http://127.0.0.1:{port}", insecure=True))
        )
        span_observer()(told())
    finally:
        server.stop(None)
    (span,) = received[0].resource_spans[0].scope_spans[0].spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("gnuq.score", TRACE, PARENT)
    numbers = {attribute.key: attribute.value.double_value for attribute in span.attributes}
    assert numbers["gnuq.log_grad_norm_sq"] == 9.5


def test_nothing_of_opentelemetry_is_imported_while_tracing_is_off():
    program = (
        "import sys, gnuq_serve.service.service, gnuq_serve.service.middleware, gnuq_serve.service.routes; "
        "from gnuq_serve.service.settings.model import load_settings; "
        "gnuq_serve.service.service.UncertaintyService(load_settings()); "
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
