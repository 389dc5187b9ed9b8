"""The score in LangChain with a real server: some of the scenarios that have a scripted one in tests/unit."""

from __future__ import annotations

import pytest
from langchain_gnuq import ChatGnuq
from langchain_scenarios import CHAT_GNUQ, HANDLER_OF_CALL, QUESTION, SCENARIOS, Case, summed
from live_server import KEY, NAME

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The function `loads` is in beta"),
]

# One of each path through the clients; structured output and tool calls are a grammar's, so that they come.
ASKED = [
    "`invoke`",
    "`agenerate`, each of `n` choices",
    "`stream`: last chunk, sum of the chunks",
    "`astream`: last chunk, sum of the chunks",
    "`prompt \\| model \\| StrOutputParser()`, `astream`",
    "`with_structured_output`",
    "`with_structured_output`, `stream`",
    "`bind_tools`, a tool call, `stream`",
    "hit of a serialising cache",
    '`create_agent`, `stream_mode="messages"`, async',
    "`stream_events` v3, its output",
]
BY_RUN_ID = {name for name in ASKED if "StrOutput" in name or "structured" in name}


@pytest.fixture(scope="module")
def settings(server):
    address = {"base_url": f"{server.base_url}/v1", "api_key": KEY}
    return {**address, "model": NAME, "temperature": 0, "max_tokens": 24}


@pytest.mark.parametrize("way", [CHAT_GNUQ, HANDLER_OF_CALL])
@pytest.mark.parametrize("name", ASKED)
async def test_the_score_arrives(settings, name, way):
    outcome = await SCENARIOS[name](Case(way, settings))
    assert outcome == ("by run id" if name in BY_RUN_ID else "yes")


def test_the_options_reach_the_scorer(settings):
    model = ChatGnuq(**settings, uncertainty={"mode": "answer_only", "trace": True})
    message = model.invoke(QUESTION)
    uncertainty = message.response_metadata["uncertainty"]
    assert uncertainty["mode"] == "answer_only"
    assert len(uncertainty["trace"]["epistemic"]) == uncertainty["tokens"] > 0
    streamed = summed(list(model.stream(QUESTION)))
    assert streamed.text == message.text
    assert streamed.response_metadata["uncertainty"]["log_grad_norm_sq"] == pytest.approx(
        uncertainty["log_grad_norm_sq"], abs=1e-4
    )
    assert model.invoke(QUESTION, uncertainty=False).response_metadata["uncertainty"]["status"] == "skipped"
