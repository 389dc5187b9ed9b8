"""What an operator sees of a real server: series, spans, log lines."""

import json
import secrets

import httpx
import pytest
from live_server import CHAT, HEADERS, families, sample
from prometheus_client.metrics import MetricWrapperBase

from gnuq_serve.service.seeing import metrics

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def ask(server, **headers):
    body = CHAT | {"messages": [{"role": "user", "content": "Zebra zebra?"}]}
    response = httpx.post(
        f"{server.base_url}/v1/chat/completions", json=body, headers=HEADERS | headers, timeout=120
    )
    return response.json()["choices"][0]["uncertainty"]


def test_every_series_stands_beside_vllms(server):
    ask(server)
    found = families(server)
    ours = {one._name for one in vars(metrics).values() if isinstance(one, MetricWrapperBase)}
    assert ours <= found.keys()
    assert "vllm:request_success" in found  # what an alert rule compares with
    assert "vllm:num_requests_waiting" in found


def test_an_answer_is_in_the_series(server):
    names = ["gnuq_log_grad_norm_sq_count", "gnuq_batch_answers_count", "gnuq_batch_seconds_sum"]
    names += [
        "gnuq_log_probability_difference_count",
        "gnuq_score_seconds_count",
        "gnuq_score_waiting_seconds_count",
    ]
    entropies = sample(server, "gnuq_entropy_nats_sum")
    before = [sample(server, name) for name in names]
    score = ask(server)
    norms, batches, seconds, compared, scores, waits = (
        sample(server, name) - old for name, old in zip(names, before, strict=True)
    )
    assert (norms, batches, compared, scores, waits) == (1, 1, 1, 1, 1)
    assert sample(server, "gnuq_entropy_nats_sum") - entropies == pytest.approx(score["entropy"], rel=1e-6)
    assert 0 < seconds <= score["seconds"]
    assert sample(server, "gnuq_scorer_state", status="ready") == 1
    assert sample(server, "gnuq_queue_limit") == 256
    assert sample(server, "gnuq_queue_answers") == 0
    # Rounding alone is between the two, so all that were compared are in the buckets below 0.01.
    close = sample(server, "gnuq_log_probability_difference_bucket", le="0.01")
    assert close == sample(server, "gnuq_log_probability_difference_count")


def test_a_span_of_the_score_stands_beside_vllms_own(server, receiver):
    trace, parent = secrets.token_hex(16), secrets.token_hex(8)
    score = ask(server, traceparent=f"00-{trace}-{parent}-01")
    spans = {span.name: span for span in receiver.of_trace(trace, 2)}
    assert set(spans) == {"llm_request", "gnuq.score"}
    assert {span.parent_span_id.hex() for span in spans.values()} == {parent}
    ours = {attribute.key: attribute.value for attribute in spans["gnuq.score"].attributes}
    assert ours["gnuq.id"].string_value == score["id"]
    assert ours["gnuq.log_grad_norm_sq"].double_value == score["log_grad_norm_sq"]
    assert ours["gnuq.finish_reason"].string_value in {"stop", "length"}
    # Scored after it was generated.
    assert spans["gnuq.score"].start_time_unix_nano > spans["llm_request"].start_time_unix_nano
    assert b"ebra" not in spans["gnuq.score"].SerializeToString()


def test_the_log_has_a_line_of_json_for_the_answer_and_no_text(server):
    score = ask(server)
    log = server.log_path.read_text()
    ours = [json.loads(line) for line in log.splitlines() if line.startswith('{"time"')]
    (line,) = [line for line in ours if line.get("id") == score["id"]]
    assert (line["logger"], line["message"], line["level"]) == ("gnuq_serve.answers", "answer scored", "info")
    assert line["log_grad_norm_sq"] == score["log_grad_norm_sq"]
    assert any(line["message"].startswith("the scorer is ready after") for line in ours)
    assert "ebra" not in log
