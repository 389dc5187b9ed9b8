"""How an answer reaches a LangChain user, and whether its uncertainty comes too: the table of docs/langchain.md.

``python tests/langchain_scenarios.py`` writes it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain_core.caches import BaseCache, InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.load import dumps, loads
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_gnuq import ChatGnuq, UncertaintyCallbackHandler
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel, Field
from scripted_openai import Reply, running

DOCS = Path(__file__).parents[1] / "docs" / "langchain.md"
BEGIN, END = "<!-- scenarios: begin -->", "<!-- scenarios: end -->"
QUESTION = "What is the capital of France?"

HANDLER_OF_CALL, HANDLER_OF_MODEL, CHAT_GNUQ = (
    "handler in the call's config",
    "handler on the model",
    "`ChatGnuq`",
)
WAYS = (HANDLER_OF_CALL, HANDLER_OF_MODEL, CHAT_GNUQ)


@dataclass
class Case:
    """A server, and one of the three ways to ask it.

    ``settings`` are those of a chat model; more of them may be given for one model.
    """

    way: str
    settings: dict[str, Any]
    handler: UncertaintyCallbackHandler = field(default_factory=UncertaintyCallbackHandler)
    run_id: uuid.UUID = field(default_factory=uuid.uuid4)
    asked: list[BaseChatModel] = field(default_factory=list)

    def model(self, **more: Any) -> BaseChatModel:
        settings = self.settings | more
        if self.way == CHAT_GNUQ:
            model: BaseChatModel = ChatGnuq(**settings)
        else:
            model = ChatOpenAI(**settings, callbacks=[self.handler] if self.way == HANDLER_OF_MODEL else None)
        self.asked.append(model)
        return model

    @property
    def config(self) -> RunnableConfig:
        config: RunnableConfig = {"run_id": self.run_id, "configurable": {"thread_id": "1"}}
        if self.way == HANDLER_OF_CALL:
            config["callbacks"] = [self.handler]
        return config

    def seen(self, *messages: Any) -> str:
        """``yes`` where every message carries a score, ``by run id`` where only that finds it, else ``no``."""
        found = [scored_on(message) for message in messages]
        if found and all(found):
            return "yes"
        source = self.asked[0] if self.way == CHAT_GNUQ else self.handler
        remembered = source.uncertainty_of(self.run_id)
        return "by run id" if remembered is not None and remembered.status == "scored" else "no"


def scored_on(message: Any) -> bool:
    metadata = message.response_metadata if isinstance(message, BaseMessage) else {}
    return metadata.get("uncertainty", {}).get("status") == "scored"


def summed(chunks: list[Any]) -> Any:
    """The sum of a stream whose last chunk, and no other, carries the score; None where it is not so."""
    carriers = [chunk for chunk in chunks if "uncertainty" in chunk.response_metadata]
    if carriers != chunks[-1:] or chunks[-1].chunk_position != "last":
        return None
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    return total


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)


def capital_of(country: str) -> str:
    """The capital of a country."""
    return f"the capital of {country}"


class SerialisingCache(BaseCache):
    """Keeps text, as every cache outside of the process does."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], str] = {}

    def lookup(self, prompt: str, llm_string: str) -> Any:
        entry = self.entries.get((prompt, llm_string))
        return None if entry is None else loads(entry, allowed_objects="core")

    def update(self, prompt: str, llm_string: str, return_val: Any) -> None:
        self.entries[prompt, llm_string] = dumps(list(return_val))

    def clear(self, **kwargs: Any) -> None:
        self.entries.clear()


PROMPT = ChatPromptTemplate.from_messages([("human", "{question}")])


async def invoke(case: Case) -> str:
    return case.seen(case.model().invoke(QUESTION, case.config))


async def ainvoke(case: Case) -> str:
    return case.seen(await case.model().ainvoke(QUESTION, case.config))


async def batch(case: Case) -> str:
    return case.seen(*case.model().batch([QUESTION] * 3, case.config))


async def abatch(case: Case) -> str:
    return case.seen(*await case.model().abatch([QUESTION] * 3, case.config))


async def generate(case: Case) -> str:
    result = case.model(n=2, temperature=1).generate(
        [[HumanMessage(QUESTION)]] * 2, callbacks=case.config.get("callbacks")
    )
    return case.seen(*(generation.message for prompt in result.generations for generation in prompt))


async def agenerate(case: Case) -> str:
    result = await case.model(n=2, temperature=1).agenerate(
        [[HumanMessage(QUESTION)]], callbacks=case.config.get("callbacks")
    )
    return case.seen(*(generation.message for generation in result.generations[0]))


async def bind(case: Case) -> str:
    return case.seen(case.model().bind(stop=["\n"]).with_config(tags=["a"]).invoke(QUESTION, case.config))


async def stream(case: Case) -> str:
    return case.seen(summed(list(case.model().stream(QUESTION, case.config))))


async def astream(case: Case) -> str:
    return case.seen(summed([chunk async for chunk in case.model().astream(QUESTION, case.config)]))


async def streaming_invoke(case: Case) -> str:
    return case.seen(case.model(streaming=True).invoke(QUESTION, case.config))


async def chain_stream(case: Case) -> str:
    chain = PROMPT | case.model()
    return case.seen(summed(list(chain.stream({"question": QUESTION}, case.config))))


async def chain_stream_lambda(case: Case) -> str:
    seen: list[Any] = []
    chain = PROMPT | case.model() | RunnableLambda(lambda message: seen.append(message) or message.text)
    list(chain.stream({"question": QUESTION}, case.config))
    return case.seen(*seen)


async def text_parser(case: Case) -> str:
    chain = PROMPT | case.model() | StrOutputParser()
    return case.seen(chain.invoke({"question": QUESTION}, case.config))


async def text_parser_stream(case: Case) -> str:
    chain = PROMPT | case.model() | StrOutputParser()
    return case.seen([piece async for piece in chain.astream({"question": QUESTION}, case.config)])


async def structured(case: Case) -> str:
    city = case.model().with_structured_output(City).invoke("Name a city, as JSON.", case.config)
    assert isinstance(city, City)
    return case.seen(city)


async def structured_stream(case: Case) -> str:
    model = case.model().with_structured_output(City)
    return case.seen(list(model.stream("Name a city, as JSON.", case.config)))


async def structured_raw(case: Case) -> str:
    model = case.model().with_structured_output(City, include_raw=True)
    return case.seen((await model.ainvoke("Name a city, as JSON.", case.config))["raw"])


async def tool_call(case: Case) -> str:
    model = case.model().bind_tools([capital_of], tool_choice="capital_of")
    message = model.invoke(QUESTION, case.config)
    assert message.tool_calls
    return case.seen(message)


async def tool_call_stream(case: Case) -> str:
    model = case.model().bind_tools([capital_of], tool_choice="capital_of")
    total = summed(list(model.stream(QUESTION, case.config)))
    assert total is None or total.tool_calls
    return case.seen(total)


async def fallbacks(case: Case) -> str:
    broken = case.model(base_url="http://127.0.0.1:9/v1", max_retries=0)
    case.asked.clear()
    return case.seen(broken.with_fallbacks([case.model()]).invoke(QUESTION, case.config))


async def retry(case: Case) -> str:
    return case.seen(case.model().with_retry().invoke(QUESTION, case.config))


def cache_hit(kind: type[BaseCache]) -> Callable[[Case], Awaitable[str]]:
    async def cached(case: Case) -> str:
        model = case.model(cache=kind())
        first = model.invoke(QUESTION, case.config)
        second = model.invoke(QUESTION, case.config)
        assert second.response_metadata.get("id") == first.response_metadata["id"]
        return case.seen(second)

    return cached


def agent(case: Case, **more: Any) -> Any:
    return create_agent(case.model(), [], **more)


ASKED = {"messages": [{"role": "user", "content": QUESTION}]}


async def agent_invoke(case: Case) -> str:
    return case.seen(agent(case).invoke(ASKED, case.config)["messages"][-1])


async def agent_ainvoke(case: Case) -> str:
    return case.seen((await agent(case).ainvoke(ASKED, case.config))["messages"][-1])


async def agent_values(case: Case) -> str:
    return case.seen(list(agent(case).stream(ASKED, case.config, stream_mode="values"))[-1]["messages"][-1])


async def agent_updates(case: Case) -> str:
    updates = [update async for update in agent(case).astream(ASKED, case.config, stream_mode="updates")]
    return case.seen(updates[-1]["model"]["messages"][-1])


async def agent_state(case: Case) -> str:
    running_agent = agent(case, checkpointer=InMemorySaver())
    running_agent.invoke(ASKED, case.config)
    return case.seen(running_agent.get_state(case.config).values["messages"][-1])


class Slow(BaseCallbackHandler):
    """Another handler of the model, such as a tracer: chunks go out, and are looked at, while it works."""

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        time.sleep(0.02)


async def agent_messages(case: Case) -> str:
    model = case.model()
    model.callbacks = [Slow(), *(model.callbacks or [])]
    parts = create_agent(model, []).stream(ASKED, case.config, stream_mode="messages")
    return "yes" if sum(scored_on(chunk) for chunk, _ in parts) == 1 else "not always"


async def agent_amessages(case: Case) -> str:
    model = case.model()
    model.callbacks = [Slow(), *(model.callbacks or [])]
    parts = create_agent(model, []).astream(ASKED, case.config, stream_mode="messages")
    return "yes" if sum([scored_on(chunk) async for chunk, _ in parts]) == 1 else "not always"


def graph(answer: Callable[[MessagesState], Any]) -> Any:
    builder = StateGraph(MessagesState)
    builder.add_node("answer", answer)
    builder.add_edge(START, "answer")
    return builder.compile(checkpointer=InMemorySaver())


async def node_invoke(case: Case) -> str:
    model = case.model()
    compiled = graph(lambda state: {"messages": [model.invoke(state["messages"])]})
    compiled.invoke({"messages": [HumanMessage(QUESTION)]}, case.config)
    return case.seen(compiled.get_state(case.config).values["messages"][-1])


async def node_stream(case: Case) -> str:
    model = case.model()
    compiled = graph(lambda state: {"messages": [summed(list(model.stream(state["messages"])))]})
    try:
        compiled.invoke({"messages": [HumanMessage(QUESTION)]}, case.config)
    except Exception:
        return case.seen(None)
    return case.seen(compiled.get_state(case.config).values["messages"][-1])


async def events_v2(case: Case) -> str:
    events = case.model().astream_events(QUESTION, case.config, version="v2")
    ends = [event["data"]["output"] async for event in events if event["event"] == "on_chat_model_end"]
    return case.seen(*ends)


async def events_v3(case: Case) -> str:
    stream = case.model().stream_events(QUESTION, case.config, version="v3")
    list(stream)
    return case.seen(stream.output)


async def left_early(case: Case) -> str:
    chunks = case.model().stream(QUESTION, case.config)
    first = next(iter(chunks))
    chunks.close()
    return case.seen(first)


SCENARIOS: dict[str, Callable[[Case], Awaitable[str]]] = {
    "`invoke`": invoke,
    "`ainvoke`": ainvoke,
    "`batch`": batch,
    "`abatch`": abatch,
    "`generate`, each of `n` choices": generate,
    "`agenerate`, each of `n` choices": agenerate,
    "`bind`, `with_config`": bind,
    "`stream`: last chunk, sum of the chunks": stream,
    "`astream`: last chunk, sum of the chunks": astream,
    "`streaming=True`, `invoke`": streaming_invoke,
    "`prompt \\| model`, `stream`": chain_stream,
    "`prompt \\| model \\| lambda`, `stream`": chain_stream_lambda,
    "`prompt \\| model \\| StrOutputParser()`": text_parser,
    "`prompt \\| model \\| StrOutputParser()`, `astream`": text_parser_stream,
    "`with_structured_output`": structured,
    "`with_structured_output`, `stream`": structured_stream,
    "`with_structured_output(…, include_raw=True)`": structured_raw,
    "`bind_tools`, a tool call": tool_call,
    "`bind_tools`, a tool call, `stream`": tool_call_stream,
    "`with_fallbacks`": fallbacks,
    "`with_retry`": retry,
    "hit of the in-memory cache": cache_hit(InMemoryCache),
    "hit of a serialising cache": cache_hit(SerialisingCache),
    "`create_agent`, `invoke`": agent_invoke,
    "`create_agent`, `ainvoke`": agent_ainvoke,
    '`create_agent`, `stream_mode="values"`': agent_values,
    '`create_agent`, `stream_mode="updates"`, async': agent_updates,
    "`create_agent`, checkpointed state": agent_state,
    '`create_agent`, `stream_mode="messages"`': agent_messages,
    '`create_agent`, `stream_mode="messages"`, async': agent_amessages,
    "LangGraph node with `model.invoke`, checkpointed": node_invoke,
    "LangGraph node with `model.stream`, checkpointed": node_stream,
    "`astream_events` v2, `on_chat_model_end`": events_v2,
    "`stream_events` v3, its output": events_v3,
    "a stream that is left early": left_early,
}


def scripted_reply(request: dict[str, Any], index: int) -> Reply:
    """What each scenario needs: a tool call where tools are offered, JSON where a schema is given, else words."""
    if request.get("tools"):
        return Reply("", tool_calls=[("capital_of", {"country": "France"})])
    return Reply('{"name": "Paris"}' if "response_format" in request else "Paris it is")


async def outcomes(settings: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {
        name: {way: await scenario(Case(way, settings)) for way in WAYS} for name, scenario in SCENARIOS.items()
    }


def table(found: dict[str, dict[str, str]]) -> str:
    """Markdown."""
    rows = [f"| scenario | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
    rows += [f"| {name} | {' | '.join(by_way[way] for way in WAYS)} |" for name, by_way in found.items()]
    return "\n".join(rows)


def main() -> None:
    """Write the table into the documentation."""
    with running(scripted_reply) as server:
        found = asyncio.run(outcomes(server.settings()))
    before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    DOCS.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
