"""The real scorer process starts or says why not, is killed when it is stuck, and leaves nothing when it ends."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from live_scorer import SAMPLES, START_SECONDS, Running, gone, left_in, scorers, wait_until

from gnuq_serve.service.answer import Answer
from gnuq_serve.service.requests.request_plan import RequestOptions
from gnuq_serve.service.scorer.messages import ScorerConfig
from gnuq_serve.service.served import ServedModel, Server
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings.model import load_settings

pytestmark = pytest.mark.usefixtures("own_temp_folder")


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
