"""What the proxy asks of the server behind it, and the command line."""

import argparse
import asyncio
import logging
import threading
import time

import pytest
import uvicorn
from local_server import serving
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from gnuq_serve import cli
from gnuq_serve.managed_server import HOST, free_port
from gnuq_serve.service.proxy.upstream import Upstream, UpstreamError

MODELS = {"data": [{"id": "m", "root": "r", "max_model_len": 9}, {"id": "a", "parent": "m"}]}


def behind(answer):
    async def models(_request):
        return answer

    return Starlette(routes=[Route("/v1/models", models)])


def ask(url, work, key=None):
    async def go():
        upstream = Upstream(url, key)
        try:
            return await work(upstream)
        finally:
            await upstream.close()

    return asyncio.run(go())


def test_models_and_adapters():
    async def work(upstream):
        models = await upstream.models()
        return models, [name in upstream.adapters() for name in ("m", "a", "b")]

    with serving(behind(JSONResponse(MODELS))) as url:
        models, adapters = ask(url, work)
    assert [(model.id, model.root, model.parent, model.max_model_len) for model in models] == [
        ("m", "r", None, 9),
        ("a", None, "m", None),
    ]
    assert adapters == [False, True, True]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (JSONResponse({"error": "Unauthorized"}, 401), "--upstream-api-key"),
        (JSONResponse({}, 403), "--upstream-api-key"),
        (PlainTextResponse("hello"), "lists no models"),
        (JSONResponse({"data": []}), "lists no models"),
        (JSONResponse(MODELS, 404), "HTTP 404"),
    ],
)
def test_a_server_that_cannot_be_worked_with_is_told_at_once(answer, message):
    with serving(behind(answer)) as url, pytest.raises(UpstreamError, match=message):
        ask(url, Upstream.wait)


def test_a_server_that_is_not_up_yet_is_waited_for(caplog):
    port = free_port()
    config = uvicorn.Config(behind(JSONResponse(MODELS)), host=HOST, port=port, log_level="error")
    server = uvicorn.Server(config)

    def late():
        time.sleep(0.3)
        server.run()

    thread = threading.Thread(target=late)
    thread.start()
    with caplog.at_level(logging.INFO):
        models = ask(f"http://{HOST}:{port}", Upstream.wait)
    server.should_exit = True
    thread.join()
    assert models[0].id == "m"
    assert f"waiting for the upstream server http://{HOST}:{port}" in caplog.text


def test_a_server_that_still_loads_is_waited_for(caplog):
    answer = JSONResponse(MODELS, 503)

    async def work(upstream):
        waiting = asyncio.create_task(upstream.wait())
        await asyncio.sleep(0.3)
        assert not waiting.done()
        answer.status_code = 200
        return await waiting

    with caplog.at_level(logging.INFO), serving(behind(answer)) as url:
        assert ask(url, work)[0].id == "m"
    assert "HTTP 503" in caplog.text


def test_a_model_that_was_exchanged_is_told(caplog):
    answer = JSONResponse(MODELS)

    async def work(upstream):
        watching = asyncio.create_task(upstream.watch(0.05))
        await asyncio.sleep(0.3)
        assert "restart the proxy" not in caplog.text
        answer.body = JSONResponse({"data": [{"id": "n", "root": "other"}]}).body
        answer.raw_headers = JSONResponse({"data": [{"id": "n", "root": "other"}]}).raw_headers
        await asyncio.sleep(0.3)
        watching.cancel()
        return "n" in upstream.adapters()

    with serving(behind(answer)) as url:
        assert ask(url, work) is False
    assert "now serves {'other'} instead of {'r'}: restart the proxy" in caplog.text


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://[::1", "nothing"])
def test_a_wrong_url_is_one_line(url, capsys):
    assert cli.main(["proxy", "--upstream", url, "--model", "m"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"gnuq-serve: --upstream {url}")
    assert err.count("\n") == 1


@pytest.mark.slow  # transformers is imported
def test_a_wrong_model_is_one_line(capsys, tmp_path):
    argv = ["proxy", "--upstream", "http://127.0.0.1:1", "--model", str(tmp_path), "--dtype", "float32"]
    assert cli.main(argv) == 1
    err = capsys.readouterr().err
    assert str(tmp_path) in err
    assert err.rstrip().count("\n") == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--hf-overrides", "{"], "--hf-overrides"),
        (["--hf-overrides", "[1]"], "--hf-overrides"),
        (["--gnuq-max-que", "3"], "did you mean '--gnuq-max-queue'"),
        (["--tensor-parallel-size", "2"], "unrecognized"),
    ],
)
def test_wrong_flags(capsys, more, message):
    with pytest.raises(SystemExit):
        cli.main(["proxy", "--upstream", "http://127.0.0.1:1", "--model", "m", *more])
    assert message in capsys.readouterr().err


def test_wrong_settings_are_told_before_anything_starts(capsys, tmp_path):
    config = tmp_path / "gnuq.yaml"
    config.write_text("max_queu: 3\n")
    argv = ["proxy", "--upstream", "http://127.0.0.1:1", "--model", "m", "--gnuq-config", str(config)]
    assert cli.main(argv) == 1
    assert "did you mean 'max_queue'" in capsys.readouterr().err


def test_the_key_may_be_a_variable(monkeypatch):
    from gnuq_serve.service.proxy.command import add_proxy
    from gnuq_serve.service.settings.model import load_settings

    monkeypatch.setenv("GNUQ_UPSTREAM_API_KEY", "secret")
    parser = argparse.ArgumentParser()
    add_proxy(parser.add_subparsers())
    args = parser.parse_args(["proxy", "--upstream", "http://u", "--model", "m"])
    assert args.upstream_api_key == "secret"
    assert "secret" not in parser.format_help()
    load_settings()  # it is no setting of scoring, and no mistake either
