import subprocess
import sys

import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from gnuq_serve.service.scorer.messages import ScorerState
from gnuq_serve.service.seeing import metrics
from gnuq_serve.service.seeing.observation import Observation, RequestContext
from gnuq_serve.uncertainty import Uncertainty

CHAT = RequestContext(route="chat")
SCORED = Uncertainty(
    status="scored",
    mode="exact",
    tokens=2,
    log_probability=-1.5,
    entropy=0.7,
    log_grad_norm_sq=9.5,
    warnings=("a grammar forced tokens: …", "something new"),
    p_correct=0.83,
    decision="answer",
    calibration="faq@77b1",
    seconds=2.0,
)


class Change:
    """By how much a series of this process has changed since it was first asked for."""

    def __init__(self):
        self.before = {}

    def __call__(self, name, **labels):
        value = REGISTRY.get_sample_value(name, labels) or 0.0
        return value - self.before.setdefault((name, *sorted(labels.items())), value)


@pytest.fixture
def change():
    return Change()


def observed(change, series, observation):
    for name, labels in series:
        change(name, **labels)
    metrics.observe(observation)
    return [change(name, **labels) for name, labels in series]


def test_a_scored_answer_is_in_every_series(change):
    series = [
        ("gnuq_answers_total", {"route": "chat", "status": "scored", "reason": ""}),
        ("gnuq_score_seconds_sum", {"status": "scored"}),
        ("gnuq_score_waiting_seconds_sum", {}),
        ("gnuq_warnings_total", {"warning": "grammar"}),
        ("gnuq_warnings_total", {"warning": "other"}),
        ("gnuq_log_grad_norm_sq_bucket", {"mode": "exact", "le": "10.0"}),
        ("gnuq_log_grad_norm_sq_bucket", {"mode": "exact", "le": "9.0"}),
        ("gnuq_entropy_nats_sum", {}),
        ("gnuq_log_probability_difference_sum", {}),
        ("gnuq_p_correct_sum", {"calibration": "faq@77b1"}),
        ("gnuq_decisions_total", {"calibration": "faq@77b1", "decision": "answer"}),
    ]
    told = Observation(
        result=SCORED.to_dict(), context=CHAT, engine_log_probability=-1.25, pass_seconds=0.5, prompt_tokens=9
    )
    assert observed(change, series, told) == pytest.approx([1, 2.0, 1.5, 1, 1, 1, 0, 0.7, 0.25, 0.83, 1])


@pytest.mark.parametrize(
    ("result", "status", "code"),
    [
        (Uncertainty.skipped("the scoring queue is full (max_queue=3)"), "skipped", "overload"),
        (Uncertainty.failed("the weather"), "failed", "other"),
    ],
)
def test_an_answer_without_a_score_is_counted_by_its_reason_alone(change, result, status, code):
    series = [
        ("gnuq_answers_total", {"route": "uncertainty", "status": status, "reason": code}),
        ("gnuq_score_seconds_count", {"status": status}),
        ("gnuq_score_waiting_seconds_count", {}),
        ("gnuq_log_grad_norm_sq_count", {"mode": "exact"}),
        ("gnuq_log_probability_difference_count", {}),
    ]
    assert observed(change, series, Observation(result=result.to_dict())) == [1, 0, 0, 0, 0]
    told = Observation(result=result.replace(seconds=1.0).to_dict(), engine_log_probability=-1.0)
    assert observed(change, series, told) == [2, 1, 0, 0, 0]


def test_a_gradient_of_zero_has_no_logarithm_and_is_left_out(change):
    series = [("gnuq_log_grad_norm_sq_count", {"mode": "exact"}), ("gnuq_entropy_nats_count", {})]
    assert observed(change, series, Observation(result=SCORED.replace(log_grad_norm_sq=None).to_dict())) == [0, 1]


def test_the_scorers_state_is_one_of_all_and_restarts_are_counted(change):
    def states():
        return {
            status: REGISTRY.get_sample_value("gnuq_scorer_state", {"status": status})
            for status in ("starting", "ready", "restarting", "failed", "stopped")
        }

    change("gnuq_scorer_restarts_total")
    for status in ("starting", "ready", "restarting", "ready"):
        metrics.show_scorer_state(ScorerState(status=status))
        assert {name for name, value in states().items() if value == 1} == {status}
        assert sum(states().values()) == 1
    assert change("gnuq_scorer_restarts_total") == 1


# One of several API server processes; what it tells is the same in each.
PROCESS = """
import sys
from gnuq_serve.service.seeing import metrics
from gnuq_serve.service.scorer.messages import ScorerState
from gnuq_serve.service.seeing.observation import Observation, RequestContext
from gnuq_serve.uncertainty import Uncertainty

metrics.QUEUE_LIMIT.set(16)
metrics.show_scorer_state(ScorerState(status="starting"))
metrics.show_scorer_state(ScorerState(status="ready"))
metrics.observe_batch(3, 0.2)
with metrics.QUEUE.track_inprogress():
    for value in map(float, sys.argv[1:]):
        numbers = {"log_grad_norm_sq": value, "entropy": 1.0, "decision": "answer"}
        result = Uncertainty(status="scored", mode="exact", **numbers)
        metrics.observe(Observation(result=result.to_dict(), context=RequestContext(route="chat")))
    print("told", flush=True)
    sys.stdin.read()
"""


def test_several_processes_add_up_as_vllm_collects_them(tmp_path, monkeypatch):
    """Each process writes files; whichever is asked for /metrics reads those of all."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *values],
            env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for values in (["8.5", "9.5"], ["9.75"])
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == b"told\n"
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(tmp_path))
        value = registry.get_sample_value
        scored = {"route": "chat", "status": "scored", "reason": ""}
        assert value("gnuq_answers_total", scored) == 3
        assert value("gnuq_log_grad_norm_sq_bucket", {"mode": "exact", "le": "9.0"}) == 1
        assert value("gnuq_log_grad_norm_sq_bucket", {"mode": "exact", "le": "10.0"}) == 3
        assert value("gnuq_entropy_nats_count") == 3
        assert value("gnuq_decisions_total", {"calibration": "", "decision": "answer"}) == 3
        assert value("gnuq_batch_answers_sum") == 6
        assert value("gnuq_queue_answers") == 2
        assert value("gnuq_queue_limit") == 16  # one queue serves both
        assert value("gnuq_scorer_state", {"status": "ready"}) == 2
        assert value("gnuq_scorer_state", {"status": "starting"}) == 0
        assert not [
            sample.labels for family in registry.collect() for sample in family.samples if "pid" in sample.labels
        ]
    finally:
        for process in processes:
            process.communicate(timeout=10)
