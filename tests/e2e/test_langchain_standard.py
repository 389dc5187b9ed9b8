"""LangChain's standard integration tests of chat models, for ChatGnuq and a real server with a small real model.

``GNUQ_STANDARD_STOCK=1`` runs them for stock `ChatOpenAI` and plain vLLM instead: the same ones fail.
With a server that can call tools: tests/unit/test_langchain_standard_scripted.py.
"""

from __future__ import annotations

import os
from types import FunctionType
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_gnuq import ChatGnuq
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from live_server import KEY, NAME

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.filterwarnings("ignore::UserWarning")]

STOCK = bool(os.environ.get("GNUQ_STANDARD_STOCK"))
NO_ARGUMENTS = "the model gives a list or a string where the arguments of a tool are to be"
NO_CALL = "the model calls no tool"
TOO_LONG = "the model writes on in its JSON until it is cut off"
FAILING = {
    "test_tool_calling": NO_ARGUMENTS,
    "test_tool_calling_async": NO_ARGUMENTS,
    "test_bind_runnables_as_tools": NO_ARGUMENTS,
    "test_tool_choice": NO_ARGUMENTS,
    "test_tool_calling_with_no_arguments": NO_ARGUMENTS,
    "test_structured_few_shot_examples": NO_ARGUMENTS,
    "test_structured_output_pydantic_2_v1": NO_ARGUMENTS,
    "test_unicode_tool_call_integration": NO_ARGUMENTS,
    "test_agent_loop": NO_CALL,
    "test_structured_output_optional_param": TOO_LONG,
    "test_json_mode": TOO_LONG,
}


@pytest.fixture(scope="module", autouse=True)
def _server(request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue("plain_server" if STOCK else "server")
    TestStandard.base_url = f"{server.base_url}/v1"


class TestStandard(ChatModelIntegrationTests):
    """Greedy answers: what the small model cannot do it never can."""

    base_url = ""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI if STOCK else ChatGnuq

    @property
    def chat_model_params(self) -> dict[str, Any]:
        address = {"base_url": self.base_url, "api_key": KEY}
        return {**address, "model": NAME, "temperature": 0, "max_tokens": 64, "stream_usage": True}

    @property
    def supports_json_mode(self) -> bool:
        return True


def expected_to_fail(name: str, reason: str) -> Any:
    """The standard test of that name, its marks and one more."""
    test = getattr(ChatModelIntegrationTests, name)
    copy = FunctionType(test.__code__, test.__globals__, name, test.__defaults__, test.__closure__)
    copy.__kwdefaults__ = test.__kwdefaults__
    copy.pytestmark = list(getattr(test, "pytestmark", []))
    return pytest.mark.xfail(strict=True, reason=reason)(copy)


for failing, why in FAILING.items():
    setattr(TestStandard, failing, expected_to_fail(failing, why))
