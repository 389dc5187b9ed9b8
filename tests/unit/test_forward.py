"""The forwarder between two real sockets: what the other server sees, and what the client gets."""

import asyncio
import gzip
import socket
import threading
import time
from contextlib import closing

import httpx
import pytest
from local_server import serving

from gnuq_serve.managed_server import HOST, free_port
from gnuq_serve.service.proxy.app import BadGateway
from gnuq_serve.service.proxy.forward import Forwarder, end_to_end

COMPRESSED = gzip.compress(b"x" * 1000)


class Upstream:
    """Answers by path, and remembers what it saw."""

    def __init__(self):
        self.seen, self.hung_up, self.clients = [], threading.Event(), set()
        self.go_on = threading.Event()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        self.clients.add(scope["client"])
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.hung_up.set()
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.seen.append((scope["method"], scope["raw_path"], scope["query_string"], scope["headers"], body))
        path = scope["path"].removeprefix("/base")
        status, headers, parts = 200, [(b"content-type", b"text/plain")], [b"fine"]
        if path == "/status":
            status, headers = (
                int(scope["query_string"]),
                [(b"x-reason", b"R\xe9"), (b"X-Twice", b"a"), (b"x-twice", b"b")],
            )
            parts = [b'{ "error":  1}'] if status not in (204, 304) else []
        elif path == "/compressed":
            headers, parts = [(b"content-encoding", b"gzip")], [COMPRESSED]
        elif path == "/hop":
            headers = [
                (b"connection", b"x-mine"),
                (b"x-mine", b"1"),
                (b"keep-alive", b"timeout=9"),
                (b"x-kept", b"2"),
            ]
        elif path == "/length":
            headers = [(b"content-length", b"4")]
        elif path in ("/slow", "/endless"):
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
            if path == "/endless":
                while (await receive())["type"] != "http.disconnect":
                    pass
                self.hung_up.set()
                return
            await asyncio.to_thread(self.go_on.wait)
            parts = [b"second"]
        elif path == "/never":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.hung_up.set()
            return
        elif path == "/breaks":
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
            raise KeyError("broken")
        if path != "/slow":
            await send({"type": "http.response.start", "status": status, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def proxy_to(url):
    transport = httpx.AsyncHTTPTransport(trust_env=False)
    return BadGateway(Forwarder(httpx.URL(url), transport, read_here=["/read"]))


@pytest.fixture(scope="module")
def upstream():
    return Upstream()


@pytest.fixture(scope="module")
def urls(upstream):
    """Of the proxy and of the upstream server."""
    with serving(upstream, lifespan="off") as behind, serving(proxy_to(behind), lifespan="off") as front:
        yield front, behind


@pytest.fixture
def client(urls):
    with httpx.Client(base_url=urls[0], trust_env=False, timeout=5) as client:
        yield client


def headers_seen(upstream):
    return dict(upstream.seen[-1][3])


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"])
def test_every_method_and_target_as_it_was_written(client, upstream, method):
    response = client.request(
        method, "/a%2Fb/%C3%BC;v=1//c?x=%20y&z=a+b&z=", content=b"" if method == "GET" else b"body"
    )
    assert response.status_code == 200
    assert response.text == ("" if method == "HEAD" else "fine")
    assert upstream.seen[-1][:3] == (method, b"/a%2Fb/%C3%BC;v=1//c", b"x=%20y&z=a+b&z=")
    assert upstream.seen[-1][4] == (b"" if method == "GET" else b"body")


def test_a_path_of_the_upstream_comes_first(urls, upstream):
    with serving(proxy_to(urls[1] + "/base/"), lifespan="off") as front:
        assert httpx.get(f"{front}/v1/models?a=1", trust_env=False).text == "fine"
    assert upstream.seen[-1][1:3] == (b"/base/v1/models", b"a=1")


@pytest.mark.parametrize("status", [200, 201, 204, 304, 400, 401, 404, 422, 429, 500, 503])
def test_statuses_bodies_and_headers_come_back_unchanged(urls, status):
    direct, through = (httpx.get(f"{url}/status?{status}", trust_env=False) for url in reversed(urls))
    assert through.status_code == status
    assert through.content == direct.content
    drop = ("date", "transfer-encoding")
    kept = [[(n, v) for n, v in r.headers.raw if n.decode().lower() not in drop] for r in (direct, through)]
    assert [(n.lower(), v) for n, v in kept[0]] == kept[1]
    assert through.headers.get_list("x-twice") == ["a", "b"]


def test_hop_by_hop_headers_stay_on_their_hop(client, upstream):
    mine = {
        "connection": "keep-alive, X-Private",
        "x-private": "1",
        "te": "trailers",
        "upgrade": "h2c",
        "x-kept": "2",
    }
    response = client.get("/hop", headers=mine | {"proxy-authorization": "secret"})
    seen = headers_seen(upstream)
    assert seen[b"x-kept"] == b"2"
    for name in (b"x-private", b"te", b"upgrade", b"proxy-authorization", b"keep-alive"):
        assert name not in seen, name
    assert "x-mine" not in response.headers
    assert "keep-alive" not in response.headers
    assert response.headers["x-kept"] == "2"


def test_nothing_is_added_but_who_asked(client, upstream, urls):
    port = int(urls[0].rpartition(":")[2])
    with closing(socket.create_connection((HOST, port))) as connection:
        connection.sendall(
            b"GET /x HTTP/1.1\r\nhost: outside.example\r\nauthorization: Bearer k\r\nconnection: close\r\n\r\n"
        )
        connection.recv(65536)
    seen = headers_seen(upstream)
    assert seen == {
        b"host": urls[1].removeprefix("http://").encode(),
        b"authorization": b"Bearer k",
        b"x-forwarded-for": HOST.encode(),
        b"x-forwarded-host": b"outside.example",
        b"x-forwarded-proto": b"http",
    }


def test_an_earlier_proxys_word_counts(client, upstream):
    client.get("/x", headers={"x-forwarded-for": "10.0.0.7", "x-forwarded-proto": "https"})
    seen = headers_seen(upstream)
    assert (seen[b"x-forwarded-for"], seen[b"x-forwarded-proto"]) == (b"10.0.0.7", b"https")


@pytest.mark.parametrize("chunked", [True, False])
def test_bodies_with_and_without_a_length(client, upstream, chunked):
    body = bytes(range(256)) * 4000
    client.post("/x", content=iter([body[:70_000], body[70_000:]]) if chunked else body)
    assert upstream.seen[-1][4] == body
    seen = headers_seen(upstream)
    assert (b"transfer-encoding" in seen) is chunked
    assert seen.get(b"content-length") == (None if chunked else str(len(body)).encode())


def test_compression_is_between_the_two_ends_unless_the_response_is_read_here(urls, upstream):
    with httpx.stream("GET", f"{urls[0]}/compressed", trust_env=False) as response:
        assert b"".join(response.iter_raw()) == COMPRESSED
        assert response.headers["content-encoding"] == "gzip"
    assert b"gzip" in headers_seen(upstream)[b"accept-encoding"]
    httpx.post(f"{urls[0]}/read", json={}, trust_env=False)
    assert headers_seen(upstream)[b"accept-encoding"] == b"identity"


def test_a_stated_length_is_kept(client):
    response = client.get("/length")
    assert response.headers["content-length"] == "4"
    assert "transfer-encoding" not in response.headers


def test_parts_pass_as_they_come(client, upstream):
    upstream.go_on.clear()
    with client.stream("GET", "/slow") as response:
        parts = response.iter_raw()
        assert next(parts) == b"first"
        upstream.go_on.set()
        assert b"".join(parts) == b"second"


@pytest.mark.parametrize("path", ["/endless", "/never"])
def test_a_client_that_hangs_up_ends_the_upstream_request(urls, upstream, path):
    upstream.hung_up.clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(urls[0] + path, timeout=httpx.Timeout(5, read=0.2), trust_env=False)
    assert upstream.hung_up.wait(5)


def test_a_client_that_hangs_up_in_its_own_request(urls, upstream):
    upstream.hung_up.clear()
    port = int(urls[0].rpartition(":")[2])
    with closing(socket.create_connection((HOST, port))) as connection:
        connection.sendall(b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\nonly this")
        time.sleep(0.1)
        assert not upstream.hung_up.is_set()
    assert upstream.hung_up.wait(5)


def test_connections_to_the_upstream_are_kept(urls, upstream):
    upstream.clients.clear()
    for _ in range(5):
        httpx.get(f"{urls[0]}/x", trust_env=False)
    assert len(upstream.clients) == 1


def test_half_a_response_is_not_taken_for_a_whole_one(client):
    with pytest.raises(httpx.RemoteProtocolError):
        client.get("/breaks")


def test_no_server_behind():
    with serving(proxy_to(f"http://{HOST}:{free_port()}"), lifespan="off") as front:
        response = httpx.post(f"{front}/v1/chat/completions", json={}, trust_env=False)
    assert response.status_code == 502
    assert response.json()["error"]["code"] == 502
    assert HOST not in response.text


def test_names_of_headers_do_not_depend_on_case():
    given = [
        (b"Connection", b"Close , X-A"),
        (b"X-a", b"1"),
        (b"TE", b"x"),
        (b"Set-Cookie", b"a"),
        (b"Set-Cookie", b"b"),
    ]
    assert end_to_end(given) == [(b"set-cookie", b"a"), (b"set-cookie", b"b")]
