"""Two API server processes of one server: one scorer for both, whatever happens to either."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest
from live_scorer import START_SECONDS, wait_until

PROMPT, ANSWER = [1, 5, 9], [7, 2]


class ApiServer:
    """A process of the server, told what to do over its standard input."""

    def __init__(self, model, folder, **settings):
        settings = {"scorer_device": "cpu", "deadline_seconds": START_SECONDS, **settings}
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("api_server_process.py"), model, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": folder},
        )
        self._numbers = itertools.count()
        self._asked = {}
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self._process.stdout:
            number, result = json.loads(line)
            self._asked[number].set_result(result)

    def ask(self, command, *arguments):
        number = next(self._numbers)
        self._asked[number] = future = Future()
        self._process.stdin.write(json.dumps([number, command, *arguments]) + "\n")
        self._process.stdin.flush()
        return future

    def call(self, command, *arguments):
        return self.ask(command, *arguments).result(START_SECONDS)

    def score(self, **options):
        return self.ask("score", PROMPT, ANSWER, options)

    @property
    def scorers(self):
        children = psutil.Process(self._process.pid).children()
        return [child for child in children if "scorer" in " ".join(child.cmdline())]

    def kill(self):
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def model(tiny_llama, tmp_path_factory):
    import torch

    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(dtype=torch.float32).save_pretrained(path)
    return str(path)


@pytest.fixture
def folder():
    """Short, since the path of a Unix socket holds 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="t") as path:
        yield path


def test_a_servers_processes_share_one_scorer(model, folder):
    """Scores, results by id, the queue's bound, yielding; then the one that runs it is killed."""
    settings = {"max_queue": 3, "yield_to_engine": True}
    third = None
    both = leader, follower = [ApiServer(model, folder, **settings) for _ in range(2)]
    try:
        wait_until(lambda: all(server.call("state") == "ready" for server in both))
        if follower.scorers:
            leader, follower = follower, leader
        (scorer,) = leader.scorers
        assert follower.scorers == []
        scores = [server.score().result(START_SECONDS)[0] for server in both]
        for name in ("status", "fingerprint", "log_grad_norm_sq"):
            assert scores[0][name] == scores[1][name]
        assert scores[0]["status"] == "scored"

        # While the engine is busy, as one of them says, the scorer holds back what both ask.
        follower.call("engine", 4.0)
        time.sleep(0.5)
        (later,) = follower.score(wait=False).result(START_SECONDS)
        late = leader.call("score_within", 0.5)
        assert late.startswith("the scorer has not answered within 0.5 s: it waited for the engine")
        held = [leader.score(), follower.score()]
        wait_until(lambda: leader.call("load") == [3, True])
        for server in both:
            (result,) = server.score().result(START_SECONDS)
            assert (result["status"], result["reason"]) == ("skipped", "the scoring queue is full (max_queue=3)")
        assert leader.call("result", later["id"])["status"] == "pending"
        follower.call("engine", 0.0)
        assert [future.result(START_SECONDS)[0]["status"] for future in held] == ["scored", "scored"]
        wait_until(lambda: leader.call("result", later["id"])["status"] == "scored")

        # What waits in the other process when the scorer dies with its parent is scored by the next one.
        follower.call("engine", 1.0)
        time.sleep(0.5)
        waiting = follower.score()
        wait_until(lambda: follower.call("load") == [1, True])
        leader.kill()
        wait_until(lambda: not scorer.is_running() or scorer.status() == psutil.STATUS_ZOMBIE, 10)
        follower.call("engine", 0.0)
        assert waiting.result(START_SECONDS)[0]["status"] == "scored"
        (successor,) = follower.scorers

        # A third finds the scorer as it runs. When all processes of the server are killed, nothing is left.
        third = ApiServer(model, folder, **settings)
        assert third.score().result(START_SECONDS)[0]["status"] == "scored"
        assert third.scorers == []
        for server in (follower, third):
            server.kill()
            time.sleep(0.5)
        wait_until(lambda: not successor.is_running(), 10)
        assert list(Path(folder).glob("gnuq-serve-*/scorer-*")) == []
    finally:
        for server in (*both, third):
            if server is not None:
                server.kill()
