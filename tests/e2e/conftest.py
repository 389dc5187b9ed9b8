"""A real vLLM server with the demo model, started once."""

import openai
import pytest
from live_server import ENV, GNUQ_SERVE, KEY, OPTIONS, wait_for_scorer

from gnuq_serve.managed_server import ManagedServer, free_port


@pytest.fixture(scope="session")
def server(smollm2, tmp_path_factory):
    """`gnuq-serve serve`, ready to score."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "server.log"
    command = [GNUQ_SERVE, "serve", str(smollm2), *OPTIONS, "--port", str(port)]
    with ManagedServer(command, ENV, port, log) as running:
        running.wait_until_ready(["/health"])
        wait_for_scorer(running)
        yield running


@pytest.fixture
def client(server):
    """The `openai` client."""
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=KEY) as openai_client:
        yield openai_client
