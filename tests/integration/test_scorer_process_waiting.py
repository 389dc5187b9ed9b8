"""What waits for the real scorer process: deadlines, a full queue, a scorer that dies, results kept for later."""

import time

import pytest
from live_scorer import SAMPLES, START_SECONDS, Running, Stopped, close_to, wait_until

from gnuq_serve.scorer import Sample
from gnuq_serve.service.answer import Answer
from gnuq_serve.service.requests.request_plan import RequestOptions
from gnuq_serve.service.scorer.client import DeadlineError, ScorerUnavailableError
from gnuq_serve.service.served import ServedModel
from gnuq_serve.uncertainty import Uncertainty

pytestmark = pytest.mark.usefixtures("own_temp_folder")


def test_a_passed_deadline_fails_and_the_next_is_scored(running):
    client, process = running.service._client, running.process
    process.suspend()
    try:
        start = time.monotonic()
        with pytest.raises(DeadlineError, match=r"has not answered within 0\.5 s"):
            running.call(client.score(*SAMPLES[0], 0.5))
        assert 0.4 < time.monotonic() - start < 5
    finally:
        process.resume()
    assert running.call(client.score(*SAMPLES[0], START_SECONDS)).status == "scored"
    assert running.held == {}


def test_given_up_answers_leave_the_scorers_queue(running, in_process):
    """The scorer scores nothing that nobody waits for: after 200 given up, the next is there at once."""
    client = running.service._client
    with Stopped(running):
        given_up = [running.ask(client.score([1] * 30, [2] * 30, START_SECONDS)) for _ in range(200)]
        wait_until(lambda: len(running.held) == 200, 10)
        for future in given_up:
            future.cancel()
        wait_until(lambda: not running.held, 10)
        (expected,) = in_process.score([Sample(*SAMPLES[0])])
        kept = running.ask(client.score(*SAMPLES[0], START_SECONDS))
    close_to(expected)(kept.result(START_SECONDS))


def test_killed_with_a_batch_in_hand_only_that_batch_fails(running, in_process):
    """What waited its turn goes to the next scorer."""
    prompt, answer = [1] * 30, [2] * 20  # traced: some 40 of them make a batch, which takes a moment
    (expected,) = in_process.score([Sample(prompt, answer)])
    first = running.process
    waiting = [
        running.ask(running.service.score([Answer(prompt, answer)], RequestOptions(trace=True)))
        for _ in range(200)
    ]
    wait_until(lambda: any(one.started for one in list(running.held.values())), 30)
    with Stopped(running):
        time.sleep(0.3)  # all that it said has come
        held = [one.started for one in running.held.values()]
        first.kill()
    wait_until(lambda: running.service.state.status == "restarting", 10)
    start = time.monotonic()
    with pytest.raises(ScorerUnavailableError, match="exit code -9"):  # the next can't be ready that soon
        running.call(running.service._client.score(*SAMPLES[0], 0.9))
    assert time.monotonic() - start < 0.5
    waiting.append(running.ask(running.service.score([Answer(prompt, answer)])))  # comes in the meantime
    results = [Uncertainty.from_dict(result) for future in waiting for result in future.result(START_SECONDS)]
    failed = [result for result in results if result.status != "scored"]
    assert 0 < len(failed) == sum(held) < len(held)
    for result in failed:
        assert result.status == "failed"
        assert "died while it held this answer" in result.reason
    close_to(expected)(results[-1])
    assert running.process.pid != first.pid


def test_no_answer_is_lost_when_many_wait_for_a_scorer_that_dies(model_path):
    """More than ZeroMQ's queue of 1000 holds; the next scorer has them all."""
    served = ServedModel(model=model_path, dtype="float32")
    running = Running(served, deadline_seconds=START_SECONDS, max_queue=1200)
    try:
        running.wait_for("ready", "failed")
        process = running.process
        process.suspend()
        waiting = [running.ask(running.service.score([Answer(*SAMPLES[0])])) for _ in range(1200)]
        wait_until(lambda: len(running.held) == 1200, 30)
        process.kill()
        assert {future.result(START_SECONDS)[0]["status"] for future in waiting} == {"scored"}
    finally:
        running.stop()


def test_deadline_while_it_loads(model_path):
    running = Running(ServedModel(model=model_path, dtype="float32"), deadline_seconds=0.2)
    try:
        (result,) = running.score(Answer(*SAMPLES[0]))
        assert result.status == "skipped"
        assert "has not started within 0.2 s" in result.reason
    finally:
        running.stop()


@pytest.mark.parametrize(
    ("on_overload", "expected"), [("skip", ["scored", "scored", "skipped"]), ("wait", ["scored"] * 3)]
)
def test_a_full_queue_skips_or_waits(model_path, on_overload, expected):
    settings = {"deadline_seconds": START_SECONDS, "max_queue": 2, "on_overload": on_overload}
    running = Running(ServedModel(model=model_path, dtype="float32"), **settings)
    try:
        running.wait_for("ready", "failed")
        with Stopped(running):
            waiting = [running.ask(running.service.score([Answer(*SAMPLES[0])])) for _ in range(3)]
            wait_until(lambda: len(running.held) == 2, 10)
            if on_overload == "skip":
                (result,) = waiting[2].result(10)
                assert "the scoring queue is full (max_queue=2)" in result["reason"]
        assert [future.result(START_SECONDS)[0]["status"] for future in waiting] == expected
    finally:
        running.stop()


def test_who_waits_for_a_place_waits_no_longer_than_the_deadline(model_path):
    settings = {"deadline_seconds": START_SECONDS, "max_queue": 1, "on_overload": "wait"}
    running = Running(ServedModel(model=model_path, dtype="float32"), **settings)
    try:
        running.wait_for("ready", "failed")
        client = running.service._client
        with Stopped(running):
            first = running.ask(client.score(*SAMPLES[0], START_SECONDS))
            wait_until(lambda: len(running.held) == 1, 10)
            with pytest.raises(DeadlineError):
                running.call(client.score(*SAMPLES[0], 0.3))
        assert first.result(START_SECONDS).status == "scored"
    finally:
        running.stop()


def test_without_waiting_the_result_comes_later_also_through_a_restart(model_path, tmp_path):
    running = Running(
        ServedModel(model=model_path, dtype="float32"),
        deadline_seconds=START_SECONDS,
        results_path=str(tmp_path / "results.sqlite"),
    )
    try:
        running.wait_for("ready", "failed")

        def look(result_id):
            return running.call(running.service.result(result_id))

        with Stopped(running):
            done, lost = (running.score(Answer(*SAMPLES[0]), wait=False)[0] for _ in range(2))
            assert (done.status, lost.status) == ("pending", "pending")
            assert look(done.id)["status"] == "pending"
        wait_until(lambda: look(done.id)["status"] == "scored", START_SECONDS)
        wait_until(lambda: look(lost.id)["status"] == "scored", START_SECONDS)
        with Stopped(running):
            (killed,) = running.score(Answer(*SAMPLES[0]), wait=False)
            wait_until(lambda: running.held, 10)
            running.process.kill()
        wait_until(lambda: look(killed.id)["status"] == "scored", START_SECONDS)
        assert look(done.id)["status"] == "scored"
        assert look("unc-unknown") is None
        (waited,) = running.score(Answer(*SAMPLES[0]))
        wait_until(lambda: look(waited.id) is not None, 10)
    finally:
        running.stop()


def test_where_results_cannot_be_kept_only_the_pending_fail(model_path, tmp_path):
    served = ServedModel(model=model_path, dtype="float32")
    path = str(tmp_path / "nowhere" / "results.sqlite")
    running = Running(served, deadline_seconds=START_SECONDS, results_path=path)
    try:
        (later,) = running.score(Answer(*SAMPLES[0]), wait=False)
        assert later.status == "failed"
        assert path in later.reason
        assert running.score(Answer(*SAMPLES[0]))[0].status == "scored"
    finally:
        running.stop()
