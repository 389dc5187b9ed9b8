"""The real scorer process, with tiny models: what it answers, and what happens when it cannot."""

import asyncio
import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from gnuq_serve.scorer import Sample, Scorer
from gnuq_serve.service.answer import Answer
from gnuq_serve.service.requests.request_plan import RequestOptions
from gnuq_serve.service.scorer.client import DeadlineError, ScorerClient, ScorerUnavailableError
from gnuq_serve.service.scorer.messages import ScorerConfig
from gnuq_serve.service.served import ServedModel, Server
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings.model import load_settings
from gnuq_serve.uncertainty import Uncertainty

VOCABULARY = 97
START_SECONDS = 90  # importing torch and transformers on a busy machine


@pytest.fixture(scope="module")
def model_path(tiny_llama, tmp_path_factory):
    import torch

    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(vocab_size=VOCABULARY, dtype=torch.float32).save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def own_temp_folder(tmp_path_factory, monkeypatch):
    """Where the sockets are made; short, since the path of a Unix socket holds 107 bytes."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


class Running:
    """A service on an event loop in a thread of its own, as in a server."""

    def __init__(self, served, server=None, **settings):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.before = set(scorers())
        settings = {"scorer_device": "cpu"} | settings
        self.service = UncertaintyService(load_settings().model_copy(update=settings))
        self.call(self._start(served, server))

    async def _start(self, served, server):
        self.service.start(served, server)

    def call(self, coroutine, timeout=START_SECONDS):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def ask(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def score(self, *answers, **options):
        results = self.call(self.service.score(list(answers), RequestOptions(**options)))
        return [Uncertainty.from_dict(result) for result in results]

    def wait_for(self, *states):
        wait_until(lambda: self.service.state.status in states, START_SECONDS)
        return self.service.state

    @property
    def process(self):
        (process,) = set(scorers()) - self.before
        return process

    @property
    def folder(self):
        return self.service._client._folder.path

    @property
    def held(self):
        """Answers of this service that the scorer has."""
        link = self.service._client._link
        return {} if link is None else link._waiting

    def stop(self):
        self.call(self.service.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


def scorers():
    found = []
    for process in psutil.Process().children():
        try:
            if "scorer" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.02)


def left_in(folder):
    """What scorers have left of their folders."""
    return list(folder.glob("gnuq-serve-*/scorer-*"))


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def running(model_path):
    running = Running(ServedModel(model=model_path, dtype="float32"), deadline_seconds=START_SECONDS)
    try:
        running.wait_for("ready", "failed")
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def in_process(model_path):
    return Scorer.from_pretrained(model_path, dtype="float32", device="cpu")


SAMPLES = [
    ([1, 5, 9], [7, 2]),
    ([1], [3]),
    ([4, 4, 4, 96, 0, 11, 12], [5, 5, 6, 2, 90]),
    ([8, 9], [10, 11, 12, 13, 14, 15, 16, 2]),
]


def close_to(expected):
    same = ("status", "mode", "span", "tokens", "fingerprint")
    numbers = ("log_probability", "entropy", "aleatoric", "epistemic", "log_epistemic", "log_grad_norm_sq")

    def check(result):
        assert [getattr(result, name) for name in same] == [getattr(expected, name) for name in same]
        for name in numbers:
            assert getattr(result, name) == pytest.approx(getattr(expected, name), rel=1e-6, abs=1e-6), name
        for part in ("normalized", "signals"):
            for name in getattr(expected, part).__slots__:
                got, wanted = getattr(getattr(result, part), name), getattr(getattr(expected, part), name)
                if isinstance(wanted, float):
                    wanted = pytest.approx(wanted, rel=1e-6, abs=1e-6)
                assert got == wanted, name

    return check


def test_state(running, model_path, in_process):
    state = running.service.state
    assert (state.status, state.reason) == ("ready", None)
    assert (state.model, state.dtype, state.device) == (model_path, "float32", "cpu")
    assert state.fingerprint == in_process.fingerprint


def test_scores_equal_those_in_process(running, in_process):
    results = running.score(*(Answer(prompt, answer) for prompt, answer in SAMPLES))
    for result, (prompt, answer) in zip(results, SAMPLES, strict=True):
        (expected,) = in_process.score([Sample(prompt, answer)])
        close_to(expected)(result)
        assert result.warnings == ()
        assert result.seconds > 0
    assert len({result.id for result in results}) == len(SAMPLES)
    assert all(result.id.startswith("unc-") for result in results)


def test_concurrent_requests_get_each_its_own(running, in_process):
    expected = [in_process.score([Sample(*sample)])[0] for sample in SAMPLES]
    futures = [
        running.ask(running.service.score([Answer(*SAMPLES[i % 4]), Answer(*SAMPLES[(i + 1) % 4])]))
        for i in range(24)
    ]
    for i, future in enumerate(futures):
        first, second = map(Uncertainty.from_dict, future.result(START_SECONDS))
        close_to(expected[i % 4])(first)
        close_to(expected[(i + 1) % 4])(second)


def test_more_answers_at_once_than_one_batch_takes(running, in_process):
    results = running.score(*(Answer(*SAMPLES[0]) for _ in range(150)))
    (expected,) = in_process.score([Sample(*SAMPLES[0])])
    assert len(results) == 150
    for result in results:
        close_to(expected)(result)


def test_one_bad_answer_fails_alone(running):
    good = Answer(*SAMPLES[0])
    outside, empty, too_long = (
        Answer([1], [VOCABULARY]),
        Answer([1], []),
        Answer([1] * 60, [2] * 5),
    )
    results = running.score(good, outside, None, empty, too_long, good)
    assert [r.status for r in results] == ["scored", "failed", "skipped", "failed", "failed", "scored"]
    assert f"answer_ids holds {VOCABULARY}, outside the scorer's vocabulary of {VOCABULARY}" in results[1].reason
    assert "token ids" in results[2].reason
    assert "answer_ids is empty" in results[3].reason
    assert "context of 64" in results[4].reason


def test_the_engines_log_probability_is_checked(running):
    (plain,) = running.score(Answer(*SAMPLES[0]))
    half = plain.log_probability / 2
    (same,) = running.score(Answer(*SAMPLES[0], [half, half + 1e-4]))
    (other,) = running.score(Answer(*SAMPLES[0], [half, half + 1]))
    assert same.warnings == ()
    assert len(other.warnings) == 1
    assert "differs from the engine's" in other.warnings[0]


def test_only_this_user_reaches_it(running):
    folder = running.folder.stat()
    assert stat.S_IMODE(folder.st_mode) == 0o700
    assert folder.st_uid == os.getuid()
    kinds = {path.suffix: stat.S_ISSOCK(path.stat().st_mode) for path in running.folder.iterdir()}
    assert kinds == {".sock": True, ".json": False}
    assert running.process.net_connections("inet") == []


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


def test_stop_leaves_nothing(model_path, own_temp_folder):
    running = Running(ServedModel(model=model_path, dtype="float32"), keep_results=0)
    running.wait_for("ready")
    process, folder = running.process, running.folder
    assert folder.parent.parent == own_temp_folder
    process.suspend()
    waiting = running.ask(running.service.score([Answer(*SAMPLES[0])]))
    wait_until(lambda: running.held, 10)
    running.call(running.service.stop())
    (result,) = waiting.result(10)
    assert (result["status"], bool(result["reason"])) == ("failed", True)
    assert gone(process.pid)
    assert left_in(own_temp_folder) == []
    assert running.service.state.status == "stopped"
    (late,) = running.score(Answer(*SAMPLES[0]))
    assert late.status == "failed"
    assert "shutting down" in late.reason
    running.stop()  # a second time is nothing


def test_stop_while_it_loads(model_path, own_temp_folder):
    running = Running(ServedModel(model=model_path, dtype="float32"), keep_results=0)
    wait_until(lambda: set(scorers()) - running.before, 30)
    process = running.process
    waiting = running.ask(running.service.score([Answer(*SAMPLES[0])]))
    running.call(running.service.stop())
    assert waiting.result(10)[0]["status"] == "failed"
    running.stop()  # its loop too, which the answer needed
    assert gone(process.pid)
    assert left_in(own_temp_folder) == []


def test_deadline_while_it_loads(model_path):
    running = Running(ServedModel(model=model_path, dtype="float32"), deadline_seconds=0.2)
    try:
        (result,) = running.score(Answer(*SAMPLES[0]))
        assert result.status == "skipped"
        assert "has not started within 0.2 s" in result.reason
    finally:
        running.stop()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"stuck_scorer_seconds": 2.0}, "it gave no sign of life for"),
        (
            {"max_batch_seconds": 0.3, "yield_to_engine": True},
            "one batch took more than 0.3 s (max_batch_seconds)",
        ),
        ({"scorer_start_timeout_seconds": 0.5}, "not ready after 0.5 s (scorer_start_timeout_seconds)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_one_that_is_stuck_is_killed(model_path, settings, reason):
    running = Running(
        ServedModel(model=model_path, dtype="float32"),
        Server(engine_load=lambda: 0),
        deadline_seconds=START_SECONDS,
        **settings,
    )
    try:
        if "scorer_start_timeout_seconds" not in settings:
            running.wait_for("ready")
            first = running.process
            if "stuck_scorer_seconds" in settings:
                first.suspend()
            else:
                options = RequestOptions(trace=True)
                running.ask(running.service.score([Answer([1] * 30, [2] * 30)] * 200, options))
        state = running.wait_for("restarting")
        assert reason in state.reason
        if "stuck_scorer_seconds" in settings:
            assert running.score(Answer(*SAMPLES[0]))[0].status == "scored"
            assert gone(first.pid)
    finally:
        running.stop()


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


def test_a_temp_folder_too_deep_for_a_socket(model_path, own_temp_folder, monkeypatch):
    import tempfile

    deep = own_temp_folder / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    running = Running(ServedModel(model=model_path, dtype="float32"), deadline_seconds=START_SECONDS)
    try:
        (result,) = running.score(Answer(*SAMPLES[0]))
        assert result.status == "failed"
        assert "ipc path" in result.reason
        assert running.wait_for("failed")  # and does not try again for ever
    finally:
        running.stop()


def test_a_scorer_that_cannot_start_ends_in_order(tmp_path):
    """With its reason and exit code 1; an abort of the interpreter would fill the server's log."""
    config = ScorerConfig(endpoint=f"ipc://{tmp_path}/s", model=str(tmp_path), served_model=str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-m", "gnuq_serve.service.scorer.process", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdin.write(msgspec.json.encode(config) + b"\n")
        process.stdin.flush()
        state = msgspec.json.decode(process.stdout.readline())
        errors = process.stderr.read().decode()
        assert process.wait(START_SECONDS) == 1
    assert state["status"] == "failed"
    assert "Fatal Python error" not in errors


def test_before_the_start():
    service = UncertaintyService(load_settings())
    assert service.state.status == "starting"
    (result,) = asyncio.run(service.score([Answer([1], [2])]))
    assert (result["status"], result["reason"]) == ("failed", "the scorer is not started yet")
    asyncio.run(service.stop())


def test_unknown_model(tmp_path):
    path = str(tmp_path / "nowhere")
    running = Running(ServedModel(model=path, dtype="float32"), deadline_seconds=START_SECONDS)
    try:
        results = running.score(Answer([1], [2]), Answer([1], [3]))
        state = running.wait_for("failed")
        assert path in state.reason
        assert "\n" not in state.reason
        for result in [*results, *running.score(Answer([1], [2]))]:
            assert result.status == "failed"
            assert path in result.reason
        wait_until(lambda: set(scorers()) == running.before, 10)  # it does not try again
    finally:
        running.stop()


def test_scorer_model_with_another_vocabulary(model_path, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    def with_tokenizer(name, words):
        folder = tmp_path / name
        folder.mkdir()
        for file in Path(model_path).iterdir():
            (folder / file.name).symlink_to(file)
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
        return str(folder)

    served = with_tokenizer("served", ["<unk>", "a", "b"])
    same, other = with_tokenizer("same", ["<unk>", "a", "b"]), with_tokenizer("other", ["<unk>", "b", "a"])
    answer = Answer(*SAMPLES[0])
    good = Running(ServedModel(model=served, dtype="float32"), scorer_model=same, deadline_seconds=START_SECONDS)
    bad = Running(ServedModel(model=served, dtype="float32"), scorer_model=other, deadline_seconds=START_SECONDS)
    try:
        assert good.score(answer)[0].status == "scored"
        (result,) = bad.score(answer)
        assert result.status == "failed"
        assert "different vocabularies" in result.reason
        assert bad.service.state.status == "failed"
    finally:
        good.stop()
        bad.stop()


PARENT = """
import asyncio, sys
from gnuq_serve.service.scorer.messages import ScorerConfig
from gnuq_serve.service.scorer.client import ScorerClient
import psutil


async def main():
    client = ScorerClient(ScorerConfig(endpoint="", model=sys.argv[1], served_model=sys.argv[1], device="cpu"))
    client.start()
    while sys.argv[2] == "ready" and client.state.status != "ready":
        await asyncio.sleep(0.05)
    while not (children := psutil.Process().children()):
        await asyncio.sleep(0.05)
    print(client.state.status, *(child.pid for child in children), flush=True)
    await asyncio.sleep(600)


asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["starting", "ready"])
def test_a_killed_server_leaves_no_scorer_behind(model_path, own_temp_folder, when):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, model_path, when],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(own_temp_folder)},
    ) as parent:
        try:
            state, *pids = parent.stdout.readline().split()
            assert state == when
            (pid,) = map(int, pids)
            assert not gone(pid)
        finally:
            os.kill(parent.pid, signal.SIGKILL)
    wait_until(lambda: gone(pid), START_SECONDS)
    assert left_in(own_temp_folder) == []


def test_client_alone(model_path):
    async def go():
        client = ScorerClient(ScorerConfig(endpoint="", model=model_path, served_model=model_path, device="cpu"))
        client.start()
        try:
            return await client.score(*SAMPLES[1], START_SECONDS)
        finally:
            await client.stop()

    result = asyncio.run(go())
    assert (result.status, result.tokens) == ("scored", 1)


class Stopped:
    """The scorer held up while the test fills its queue."""

    def __init__(self, running):
        self.process = running.process

    def __enter__(self):
        self.process.suspend()

    def __exit__(self, *_):
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.resume()


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


def test_too_long_an_answer_is_skipped(model_path):
    running = Running(ServedModel(model=model_path, dtype="float32"), max_score_tokens=6)
    try:
        long, short = Answer([1] * 5, [2, 3]), Answer([1] * 4, [2, 3])
        skipped, scored = running.score(long, short)
        assert (skipped.status, skipped.reason) == (
            "skipped",
            "prompt and answer have 7 tokens (max_score_tokens=6)",
        )
        assert scored.status == "scored"
    finally:
        running.stop()


def test_thinking_and_answer_are_scored_apart(running, in_process):
    prompt, thinking, answer = [1, 5, 9], [7, 3, 4], [8, 2]
    whole = Answer(prompt, thinking + answer, thinking=3)
    (plain,) = running.call(running.service.score([whole]))
    assert "thinking" not in plain
    (both,) = running.call(running.service.score([whole], RequestOptions(thinking=True)))
    headline, thought = Uncertainty.from_dict(both), Uncertainty.from_dict(both["thinking"])
    expected_answer, expected_thinking = in_process.score(
        [Sample(prompt + thinking, answer), Sample(prompt, thinking)]
    )
    close_to(expected_answer)(headline)
    close_to(expected_answer)(Uncertainty.from_dict(plain))
    close_to(expected_thinking.replace(span="thinking"))(thought)
    (unfinished,) = running.call(
        running.service.score([Answer(prompt, thinking, thinking=3)], RequestOptions(thinking=True))
    )
    assert (unfinished["status"], unfinished["thinking"]["status"]) == ("skipped", "scored")
    (none,) = running.call(running.service.score([Answer(prompt, answer)], RequestOptions(thinking=True)))
    assert (none["status"], none["thinking"]) == ("scored", None)


def test_a_forced_answer_is_scored_with_a_warning(running):
    (result,) = running.score(Answer(*SAMPLES[0], grammar=True))
    assert result.status == "scored"
    assert len(result.warnings) == 1
    assert "grammar" in result.warnings[0]


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


def test_an_adapters_answer_is_scored_with_the_adapter(running, model_path, in_process, tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    adapted = Scorer.from_model(model.eval())
    prompt, answer = SAMPLES[0]
    with_it, without, nowhere = running.score(
        Answer(prompt, answer, adapter=str(tmp_path)),
        Answer(prompt, answer),
        Answer(prompt, answer, adapter="/no"),
    )
    (expected,), (plain,) = (one.score([Sample(prompt, answer)]) for one in (adapted, in_process))
    close_to(expected.replace(fingerprint=with_it.fingerprint))(with_it)
    close_to(plain)(without)
    assert with_it.fingerprint != without.fingerprint
    assert nowhere.status == "skipped"
    assert nowhere.reason.startswith("adapter not loaded: ")


def test_options_reach_the_scorer(running, in_process):
    prompt, answer = SAMPLES[2]
    given = Answer(prompt, answer)
    (plain,), (asked,) = running.score(given), running.score(given, trace=True, semantic=True)
    (expected,) = in_process.score([Sample(prompt, answer)], trace=True, semantic=True)
    assert plain.trace is None
    assert plain.signals.semgrad is None
    assert asked.trace.epistemic == pytest.approx(expected.trace.epistemic, rel=1e-5)
    for name in ("semgrad", "exgrad", "paragrad", "hybridgrad", "log_hidden_grad"):
        assert getattr(asked.signals, name) == pytest.approx(getattr(expected.signals, name), rel=1e-5), name
    (only,) = running.score(given, mode="answer_only")
    (expected_only,) = in_process.score([Sample(prompt, answer)], mode="answer_only")
    close_to(expected_only)(only)
    assert only.fingerprint != plain.fingerprint


def test_what_the_operator_does_not_allow_is_left_out_with_a_warning(running, monkeypatch):
    prompt, answer = SAMPLES[2]
    settings = running.service.settings.model_copy(update={"max_trace_tokens": 2, "allow_semantic": False})
    monkeypatch.setattr(running.service, "settings", settings)
    (result,) = running.score(Answer(prompt, answer), trace=True, semantic=True)
    assert result.status == "scored"
    assert result.trace is None
    assert result.signals.semgrad is None
    assert result.warnings == (
        "no trace: the answer has 5 tokens (max_trace_tokens=2)",
        "no semantic signals: not allowed here (allow_semantic=false)",
    )
