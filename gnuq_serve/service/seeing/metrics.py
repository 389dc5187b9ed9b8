"""Prometheus series; on vLLM's own /metrics. Never a word of text, and no label that a client can make up.

They add up over several API server processes: plain metrics, no collectors of our own, and for each gauge a
``multiprocess_mode``. ``docs/operating.md`` says what each is good for.
"""

from __future__ import annotations

from typing import get_args

from prometheus_client import Counter, Gauge, Histogram

from gnuq_serve.service.scorer.messages import Pong, ScorerState, ScorerStatus
from gnuq_serve.service.seeing.observation import Observation
from gnuq_serve.service.seeing.reasons import reason_code, warning_code

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)

ANSWERS = Counter(
    "gnuq_answers",
    "Answers by outcome of scoring; reason: a short code, empty for scored ones.",
    ["route", "status", "reason"],
)
UNSCORED_REQUESTS = Counter(
    "gnuq_unscored_requests", "Requests whose answers got no uncertainty object.", ["route", "reason"]
)
WITHHELD = Counter(
    "gnuq_withheld_answers", "Answers held back by the gate: uncertain or unscored.", ["route", "reason"]
)
WARNINGS = Counter("gnuq_warnings", "Warnings on scored answers, by a short code.", ["warning"])
DECISIONS = Counter("gnuq_decisions", "Decisions on scored answers.", ["calibration", "decision"])
P_CORRECT = Histogram(
    "gnuq_p_correct",
    "Calibrated probability that the answer is correct.",
    ["calibration"],
    buckets=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1),
)
LOG_GRAD_NORM_SQ = Histogram(
    "gnuq_log_grad_norm_sq",
    "Natural logarithm of the squared norm of the gradient of the answer's log-probability.",
    ["mode"],
    buckets=(-20, -10, -5, -2, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 18, 20, 25, 30),
)
ENTROPY = Histogram(
    "gnuq_entropy_nats",
    "Mean entropy of the answer's predictive distributions, in nats.",
    buckets=(0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 10),
)
DIFFERENCE = Histogram(
    "gnuq_log_probability_difference",
    "Absolute difference between the scorer's log-probability of an answer and the engine's.",
    buckets=(1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
)
SECONDS = Histogram(
    "gnuq_score_seconds", "Time from asking for a score to having its outcome.", ["status"], buckets=_SECONDS
)
WAITING_SECONDS = Histogram(
    "gnuq_score_waiting_seconds", "Of it, what a scored answer waited for its pass.", buckets=_SECONDS
)
BATCH_SECONDS = Histogram("gnuq_batch_seconds", "Time of scoring one batch.", buckets=_SECONDS)
BATCH_ANSWERS = Histogram(
    "gnuq_batch_answers", "Answers in one batch.", buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
)
QUEUE = Gauge(
    "gnuq_queue_answers", "Answers that wait for a score or are being scored.", multiprocess_mode="livesum"
)
QUEUE_LIMIT = Gauge("gnuq_queue_limit", "How many may (max_queue).", multiprocess_mode="livemax")
SCORER_STATE = Gauge(
    "gnuq_scorer_state",
    "API server processes that find the scorer in this state.",
    ["status"],
    multiprocess_mode="livesum",
)
SCORER_WAITING = Gauge(
    "gnuq_scorer_waiting_answers",
    "Answers in the scorer's queue, those of all API server processes, without the batch in hand.",
    multiprocess_mode="mostrecent",
)
SCORER_YIELDING = Gauge(
    "gnuq_scorer_yielding",
    "1 where answers wait because requests wait in the engine (yield_to_engine).",
    multiprocess_mode="mostrecent",
)
SCORER_RESTARTS = Counter("gnuq_scorer_restarts", "Times that a scorer process ended and was started again.")

# Drift and audits, by calibration. Each API server process has its own window of scores; the worst is shown.
DRIFT_STATISTIC = Gauge(
    "gnuq_drift_statistic",
    "Kolmogorov-Smirnov distance between live p_correct and the calibration's, last comparison.",
    ["calibration"],
    multiprocess_mode="livemax",
)
DRIFT_P_VALUE = Gauge("gnuq_drift_p_value", "Its p-value.", ["calibration"], multiprocess_mode="livemin")
DRIFTED = Gauge(
    "gnuq_drifted",
    "1 where a comparison since the start found that live scores differ from the calibration's.",
    ["calibration"],
    multiprocess_mode="livemax",
)
AUDIT_ANSWERS = Gauge(
    "gnuq_audit_answers",
    "Answers given under a promise and drawn for an audit, labelled right or wrong, or waiting for a label.",
    ["calibration", "max_error", "label"],
    multiprocess_mode="mostrecent",
)
AUDIT_BROKEN = Gauge(
    "gnuq_audit_promise_broken",
    "1 where the audit's labels show that the promised share of errors is not kept.",
    ["calibration", "max_error"],
    multiprocess_mode="mostrecent",
)
AUDIT_RISK = Gauge(
    "gnuq_audit_risk",
    "Ends of the interval of the share of errors by the audit's labels, valid at all times.",
    ["calibration", "max_error", "end"],
    multiprocess_mode="mostrecent",
)


def observe(observation: Observation) -> None:
    """Count one final result; an observer of the service."""
    result = observation.result
    status, reason = str(result["status"]), reason_code(result.get("reason"))
    ANSWERS.labels(observation.context.route, status, reason).inc()
    seconds = result.get("seconds")
    if seconds is not None:
        SECONDS.labels(status).observe(seconds)
    if status != "scored":
        return
    if seconds is not None and observation.pass_seconds is not None:
        WAITING_SECONDS.observe(max(0.0, seconds - observation.pass_seconds))
    for code in sorted(map(warning_code, result["warnings"])):
        WARNINGS.labels(code).inc()
    if (log_norm := result["log_grad_norm_sq"]) is not None:
        LOG_GRAD_NORM_SQ.labels(result["mode"]).observe(log_norm)
    if (entropy := result["entropy"]) is not None:
        ENTROPY.observe(entropy)
    served = observation.engine_log_probability
    if served is not None and result["log_probability"] is not None:
        DIFFERENCE.observe(abs(result["log_probability"] - served))
    calibration = result.get("calibration") or ""
    if (p_correct := result.get("p_correct")) is not None:
        P_CORRECT.labels(calibration).observe(p_correct)
    if (decision := result.get("decision")) is not None:
        DECISIONS.labels(calibration, decision).inc()


def observe_batch(answers: int, seconds: float) -> None:
    """Count one batch of the scorer process."""
    BATCH_ANSWERS.observe(answers)
    BATCH_SECONDS.observe(seconds)


def show_load(load: Pong) -> None:
    """Show what the scorer says of its work."""
    SCORER_WAITING.set(load.waiting)
    SCORER_YIELDING.set(load.yielding)


def show_scorer_state(state: ScorerState, *, runs_it: bool = True) -> None:
    """Show how the scorer process is, and count where it is started again.

    Args:
        state: how it is.
        runs_it: this process is the one that starts it, and counts.
    """
    for status in get_args(ScorerStatus):
        SCORER_STATE.labels(status).set(status == state.status)
    if runs_it and state.status == "restarting":
        SCORER_RESTARTS.inc()
