import os
import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry, Gauge

from gnuq_serve.service.scorer.engine_load import WAITING, waiting_in_this_server

# An API server process as vLLM's: it reports what the engine told it, then works on.
PROCESS = """
import sys
from prometheus_client import Counter, Gauge
gauge = Gauge("vllm:num_requests_waiting", "Waiting.", ["model_name", "engine"], multiprocess_mode="mostrecent")
Counter("vllm:other", "Other.").inc(7)
for line in sys.stdin:
    engine, waiting = line.split()
    gauge.labels("m", engine).set(float(waiting))
    print("done", flush=True)
"""


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)


def test_the_sum_over_the_engines():
    registry = CollectorRegistry()
    assert waiting_in_this_server(registry) is None
    gauge = Gauge(WAITING, "Waiting.", ["model_name", "engine"], registry=registry)
    Gauge("vllm:num_requests_running", "Running.", registry=registry).set(9)
    gauge.labels("m", "0").set(3)
    gauge.labels("m", "1").set(1)
    assert waiting_in_this_server(registry) == 4
    gauge.labels("m", "0").set(0)
    gauge.labels("m", "1").set(0)
    assert waiting_in_this_server(registry) == 0


def test_of_several_processes_the_newest_report_of_each_engine(tmp_path, monkeypatch):
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]

    def report(process, engine, waiting):
        processes[process].stdin.write(f"{engine} {waiting}\n")
        processes[process].stdin.flush()
        assert processes[process].stdout.readline() == "done\n"

    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    try:
        assert waiting_in_this_server() is None
        report(0, 0, 5)
        assert waiting_in_this_server() == 5
        report(1, 0, 2)
        assert waiting_in_this_server() == 2
        report(1, 1, 4)
        assert waiting_in_this_server() == 6
        report(0, 0, 0)
        report(0, 1, 0)
        assert waiting_in_this_server() == 0
    finally:
        for process in processes:
            process.communicate()
