"""Real vLLM servers with the demo model, each started once."""

import openai
import pytest
from live_server import ENV, GNUQ_SERVE, KEY, OPTIONS, VLLM, proxy_command, wait_for_scorer
from span_receiver import SpanReceiver
from thinking_model import make_thinking_model
from xdist.scheduler import LoadScopeScheduling

from gnuq_serve.managed_server import ManagedServer, free_port

# Their servers are mostly their own; some also compare with ``server``.
OWN_SERVERS = {
    "test_api_servers.py",
    "test_gating.py",
    "test_langchain_standard.py",
    "test_parsers.py",
    "test_shared_weights.py",
    "test_sidecar.py",
}


class ByServer(LoadScopeScheduling):
    """One worker gets the files that share ``server``, the other the rest: so few run at a time (4 GiB each)."""

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0].rpartition("/")[2]
        return file if file in OWN_SERVERS else "server"


def pytest_xdist_make_scheduler(config, log):
    return ByServer(config, log)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """``start(command, env)``: a context in which a server runs; `--port` is added."""

    def start(command, env=ENV):
        port = free_port()
        log = tmp_path_factory.mktemp("server") / "server.log"
        return ManagedServer([*command, "--port", str(port)], env, port, log)

    return start


@pytest.fixture(scope="session")
def receiver():
    """Gets the spans of ``server``."""
    with SpanReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def server(smollm2, start, receiver):
    """`gnuq-serve serve`, ready to score; it traces, and logs each answer."""
    command = [GNUQ_SERVE, "serve", str(smollm2), *OPTIONS, "--otlp-traces-endpoint", receiver.endpoint]
    logs = {"GNUQ_LOG_FORMAT": "json", "GNUQ_LOG_ANSWERS": "info"}
    with start(command, ENV | logs | {"OTEL_BSP_SCHEDULE_DELAY": "200"}) as running:
        running.wait_until_ready(["/health"])
        wait_for_scorer(running)
        yield running


@pytest.fixture(scope="module")
def plain_server(smollm2, start):
    """vLLM without us."""
    with start([*VLLM, str(smollm2), *OPTIONS], ENV | {"VLLM_PLUGINS": ""}) as running:
        running.wait_until_ready(["/health"])
        yield running


@pytest.fixture(scope="module")
def proxy_server(smollm2, plain_server, start):
    """`gnuq-serve proxy` in front of the plain server, ready to score."""
    with start(proxy_command(smollm2, plain_server)) as running:
        running.wait_until_ready(["/health"])
        wait_for_scorer(running)
        yield running


@pytest.fixture(scope="module")
def thinking_server(smollm2, start, tmp_path_factory):
    """`gnuq-serve serve` with a reasoning parser and a tool parser, and a model that thinks."""
    model = make_thinking_model(smollm2, tmp_path_factory.mktemp("thinking") / "model")
    parser = ["--reasoning-parser", "deepseek_r1"]
    with start([GNUQ_SERVE, "serve", str(model), *OPTIONS, *parser]) as running:
        running.wait_until_ready(["/health"])
        wait_for_scorer(running)
        yield running


@pytest.fixture
def client(server):
    """The `openai` client."""
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=KEY) as openai_client:
        yield openai_client
