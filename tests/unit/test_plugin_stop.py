"""With the server's application, our scorer ends too."""

import tempfile
from contextlib import asynccontextmanager

import psutil
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from gnuq_serve.service.served import ServedModel
from gnuq_serve.vllm.plugin import GnuqPlugin


@pytest.fixture
def temp(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield folder


@pytest.mark.parametrize("breaks", [False, True])
def test_the_scorer_ends_with_the_application(temp, breaks):
    plugin, events = GnuqPlugin(), []

    @asynccontextmanager
    async def lifespan(_app):
        plugin._service.start(ServedModel(model="/nowhere", dtype="float32"))
        yield {"from": "vllm"}
        events.append("vllm stops")
        if breaks:
            raise RuntimeError("vllm breaks")

    app = Starlette(lifespan=lifespan)
    plugin.attach_router(app)
    before = set(psutil.Process().children())
    with pytest.raises(RuntimeError) if breaks else TestClient(app) as client:
        if breaks:
            with TestClient(app):
                pass
        else:
            assert client.get("/v1/uncertainty/health").json()["status"] == "starting"
            assert client.app_state == {"from": "vllm"}
    assert events == ["vllm stops"]
    assert plugin._service.state.status == "stopped"
    assert set(psutil.Process().children()) <= before
