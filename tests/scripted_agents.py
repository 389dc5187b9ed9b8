"""Agents before scripted servers: a sure or unsure model, a tool that leaves a trace, a structured response."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from scripted_openai import Reply, ScriptedServer, running, scored

from gnuq_serve.policy import Policy

POLICY = Policy(signal="normalized.probability", answer=0.8, escalate=0.6, otherwise="human")
SURE, MIDDLING, UNSURE = (-0.01, -0.4, -2.0)
HI = {"messages": [{"role": "user", "content": "Capital of France?"}]}
SENT: list[str] = []
_IDLE: list[ScriptedServer] = []


@tool
def send_mail(to: str) -> str:
    """Send a mail."""
    SENT.append(to)
    return f"sent to {to}"


class City(BaseModel):
    """A city."""

    name: str


@contextmanager
def idle_servers(count: int = 3) -> Iterator[None]:
    """Servers for `serving` to take: a client needs a tenth of a second for each new address."""
    with ExitStack() as stack:
        _IDLE.extend(stack.enter_context(running(Reply())) for _ in range(count))
        yield
        _IDLE.clear()


@contextmanager
def serving(reply: Any) -> Iterator[ScriptedServer]:
    """A server that answers like this."""
    server = _IDLE.pop()
    server.reply, server.requests = reply, []
    try:
        yield server
    finally:
        _IDLE.append(server)


def reply(mean: float | None, text: str = "Paris it is", **fields: Any) -> Reply:
    """An answer whose tokens have this mean log-probability; None: without a score."""
    return Reply(text=text, uncertainty=None if mean is None else scored(mean), **fields)


def mail(mean: float | None, *addresses: str, text: str = "") -> Reply:
    """A message that calls the tool once for each address."""
    return reply(mean, text, tool_calls=[("send_mail", {"to": address}) for address in addresses])


def model_of(server: ScriptedServer) -> ChatOpenAI:
    return ChatOpenAI(**server.settings())


def agent(server: ScriptedServer, *middleware: Any, **settings: Any) -> Any:
    return create_agent(model_of(server), middleware=middleware, **settings)


def texts(state: dict[str, Any]) -> list[str]:
    return [message.text for message in state["messages"]]


def gate_of(message: Any) -> dict[str, Any] | None:
    return message.response_metadata.get("uncertainty_gate")
