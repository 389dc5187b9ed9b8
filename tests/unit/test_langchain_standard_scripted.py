"""LangChain's standard integration tests of chat models, for ChatGnuq and a server that can call tools.

Small models cannot; what one of them makes of the same tests is in tests/e2e/test_langchain_standard.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain_gnuq import ChatGnuq
from langchain_tests.integration_tests import ChatModelIntegrationTests
from scripted_openai import Reply, running

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ARGUMENTS: dict[str, dict[str, Any]] = {
    "magic_function": {"input": 3},
    "magic_function_no_args": {},
    "greeting_generator": {"answer_style": "pirate"},
    "my_adder_tool": {"a": 3, "b": 4},
    "get_weather": {"location": "San Francisco"},
    "Joke": {"setup": "Why do cats not play poker?", "punchline": "Too many cheetahs."},
    "unicode_customer": {"customer_name": "你好啊集团 こんにちは株式会社", "description": "a company"},
}


def reply(request: dict[str, Any], index: int) -> Reply:
    """A call of the tool that is asked for, JSON where a schema is given, else words."""
    if request.get("tools") and request["messages"][-1]["role"] != "tool":
        names = [tool["function"]["name"] for tool in request["tools"]]
        choice = request.get("tool_choice")
        name = choice["function"]["name"] if isinstance(choice, dict) else names[0]
        return Reply("", tool_calls=[(name, ARGUMENTS[name])])
    return Reply(json.dumps(ARGUMENTS["Joke"]) if "response_format" in request else "Hello to you")


@pytest.fixture(scope="module", autouse=True)
def _server() -> Any:
    with running(reply) as server:
        TestChatGnuq.base_url = server.base_url
        yield


class TestChatGnuq(ChatModelIntegrationTests):
    """The score comes with every answer, and changes nothing else."""

    base_url = ""

    @property
    def chat_model_class(self) -> type[ChatGnuq]:
        return ChatGnuq

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "small", "base_url": self.base_url, "api_key": "EMPTY", "on_failure": "closed"}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "another"
