import os
import socket
import sys
import time
from pathlib import Path

import pytest

from gnuq_serve.managed_server import ManagedServer, ServerError, free_port

SCRIPT = """
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

port, mode = int(sys.argv[1]), sys.argv[2]
print("starting as", mode, flush=True)
if mode == "dies":
    print("no such model", flush=True)
    sys.exit(3)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode in ("stubborn", "parent"):
    child = subprocess.Popen(["sleep", "600"])  # takes over that the signal is ignored
    print("child", child.pid, flush=True)
asked = 0


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += 1
        routes = {
            "/health": (200, b""),
            "/text": (200, b"fine"),
            "/list": (200, b"[1]"),
            "/ready": (200, b'{"status": "ready"}'),
            "/later": (503, b'{"status": "starting"}') if asked < 3 else (200, b'{"status": "ready"}'),
            "/never": (503, b'{"status": "starting"}'),
            "/busy": (503, b""),
            "/failed": (503, b'{"status": "failed", "reason": "wrong vocabulary"}'),
            "/env": (200, json.dumps({"status": os.environ.get("ANSWER")}).encode()),
        }
        status, body = routes.get(self.path, (404, b""))
        if self.path == "/crash":
            os._exit(7)
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path):
    script = tmp_path / "server.py"
    script.write_text(SCRIPT)

    def make(mode="serves", **env):
        port = free_port()
        command = [sys.executable, str(script), str(port), mode]
        return ManagedServer(command, env, port, tmp_path / "server.log")

    return make


def child_of(server):
    (line,) = [line for line in server.log_path.read_text().splitlines() if line.startswith("child ")]
    return int(line.split()[1])


def alive(pid):
    """Runs; a zombie that nobody has collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid, within=5.0):
    deadline = time.monotonic() + within
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def test_ready_and_gone_with_all_its_children(server):
    waits = []
    with server("parent") as running:
        running.wait_until_ready(
            ["/health", "/text", "/list", "/ready", "/later"],
            30,
            lambda what, seconds: waits.append((what, seconds)),
        )
        child = child_of(running)
        assert alive(child)
        assert os.getpgid(child) != os.getpgid(0)
        running.stop(grace=5)
        assert gone(child)
        running.stop()  # a second time is nothing
    assert waits[0][0] == "/health: not answering yet"
    assert all(seconds >= 0 for _, seconds in waits)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(running.base_url.rsplit(":", 1)[1]))) != 0


def test_an_exception_in_the_block_stops_the_server_too(server):
    child = None

    def block():
        nonlocal child
        with server("parent") as running:
            running.wait_until_ready(["/health"], 30)
            child = child_of(running)
            raise KeyError

    with pytest.raises(KeyError):
        block()
    assert gone(child)


def test_what_ignores_the_signal_is_killed(server):
    with server("stubborn") as running:
        running.wait_until_ready(["/health"], 30)
        pid, child = running._process.pid, child_of(running)
        start = time.monotonic()
        running.stop(grace=0.3)
        assert time.monotonic() - start < 10
        assert gone(pid)
        assert gone(child)


def test_a_server_that_dies(server):
    with server("dies") as running, pytest.raises(ServerError, match=r"exit code 3\.\n(.|\n)*no such model"):
        running.wait_until_ready(["/health"], 30)


def test_a_server_that_dies_while_it_is_asked(server):
    with server("parent") as running:
        running.wait_until_ready(["/health"], 30)
        child = child_of(running)
        with pytest.raises(ServerError, match="exit code 7"):
            running.wait_until_ready(["/crash"], 30)
    assert gone(child)


def test_a_missing_route_is_not_waited_for(server):
    with server() as running, pytest.raises(ServerError, match="no route /v1/uncertainty/health"):
        running.wait_until_ready(["/health", "/v1/uncertainty/health"], 30)


def test_a_failed_status_is_not_waited_for(server):
    with (
        server() as running,
        pytest.raises(ServerError, match="/failed says: wrong vocabulary\nstarting as serves"),
    ):
        running.wait_until_ready(["/failed"], 30)


@pytest.mark.parametrize(("url", "state"), [("/never", "starting"), ("/busy", "HTTP 503")])
def test_time_over(server, url, state):
    with server() as running:
        running.wait_until_ready(["/health"], 30)
        with pytest.raises(ServerError, match=f"{url} was still {state} after 0 s"):
            running.wait_until_ready([url], 0.3)


def test_environment_and_no_proxy(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("ANSWER", "overridden")
    with server(ANSWER="ready") as running:
        running.wait_until_ready(["/env"], 30)


def test_not_started(server):
    with pytest.raises(ServerError, match="not started"):
        server().wait_until_ready(["/health"], 1)


def test_log_tail(tmp_path):
    server = ManagedServer([], {}, 1, tmp_path / "log")
    server.log_path.write_bytes(b"\n".join(b"line %d" % i for i in range(50)) + b"\n\xff")
    assert server.log_tail(2) == "line 49\n\N{REPLACEMENT CHARACTER}"
    assert len(server.log_tail().splitlines()) == 30


def test_free_port_can_be_bound():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))
