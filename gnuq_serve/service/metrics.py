"""Prometheus series; on vLLM's own /metrics. Never a word of text."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

ANSWERS = Counter("gnuq_answers", "Answers by outcome of scoring.", ["route", "status"])
UNSCORED_REQUESTS = Counter(
    "gnuq_unscored_requests", "Requests passed through without asking for a score.", ["route", "reason"]
)
SECONDS = Histogram(
    "gnuq_score_seconds",
    "Time that a response waited for its scores.",
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)
