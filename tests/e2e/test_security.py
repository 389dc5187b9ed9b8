"""Who may ask what, and where text may not be, on a real server with the default settings."""

import sqlite3
import stat
from pathlib import Path

import httpx
import psutil
import pytest
from live_server import BODIES, HEADERS, ask, ask_for, ask_streamed, scorer_of

from gnuq_serve.service.result_store import default_path
from gnuq_serve.service.routes import routes
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings.model import load_settings

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

OURS = [
    (method, route.path.replace("{id}", "unc-1"))
    for route in routes(UncertaintyService(load_settings()))
    for method in sorted(route.methods)
]
WORD = "Quuxzanzibar"


def test_we_have_routes_of_our_own():
    assert ("POST", "/v1/uncertainty") in OURS
    assert all(path.startswith("/v1/") for _, path in OURS)


@pytest.mark.parametrize(("method", "path"), [*OURS, *(("POST", f"/v1/{route}") for route in BODIES)])
def test_every_route_wants_the_key(server, method, path):
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": HEADERS["Authorization"][:-1]}):
        assert httpx.request(method, server.base_url + path, headers=headers).status_code == 401


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/uncertainty"])
def test_a_long_request_is_refused(server, path, chunked):
    limit = load_settings().max_body_bytes
    block = b" " * 2**20
    pieces = [block] * (limit // len(block) + 1)
    content = iter(pieces) if chunked else b"".join(pieces)
    response = httpx.post(server.base_url + path, content=content, headers=HEADERS, timeout=60)
    assert response.status_code == 413
    assert "max_body_bytes" in response.json()["error"]["message"]


def test_text_is_in_no_log_no_store_and_no_metric(server):
    for route, body in BODIES.items():
        asked = body | (
            {"prompt": WORD} if "prompt" in body else {"messages": [{"role": "user", "content": WORD}]}
        )
        ask(server, route, asked)
        ask_streamed(server, route, asked)
        pending = ask(server, route, asked | {"uncertainty": {"wait": False}})["choices"][0]["uncertainty"]
        ask_for(server, pending["id"])
        ask(server, route, asked | {"temperature": -1})
    ask(server, "uncertainty", {"prompt": WORD, "answer": WORD})
    port = server.base_url.rpartition(":")[2]
    assert WORD not in server.log_path.read_text()
    assert WORD not in httpx.get(f"{server.base_url}/metrics").text
    path = default_path(f"None:127.0.0.1:{port}")
    rows = sqlite3.connect(path).execute("SELECT body FROM results").fetchall()
    assert len(rows) >= 7
    assert WORD not in str(rows)
    files = [file for file in path.parent.iterdir() if file.is_file()]
    assert not any(WORD.encode() in file.read_bytes() for file in files)


def test_the_scorer_listens_on_a_socket_of_its_user_alone(server):
    scorer = scorer_of(server)
    assert scorer.net_connections("inet") == []
    sockets = {Path(c.laddr) for c in scorer.net_connections("unix") if c.laddr.startswith("/")}
    assert sockets
    for path in sockets:
        folder = path.parent.stat()
        assert folder.st_uid == psutil.Process().uids().real
        assert stat.S_IMODE(folder.st_mode) == 0o700
