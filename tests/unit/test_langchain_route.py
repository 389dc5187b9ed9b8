"""route_by_uncertainty in chains: which branch runs, what it is given, what a stream shows."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("langchain_openai")

from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_gnuq import UncertainAnswer, UncertaintyCallbackHandler, route_by_uncertainty
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from scripted_openai import Reply, running, scored

from gnuq_serve.policy import Policy

POLICY = Policy(signal="normalized.probability", answer=0.8, escalate=0.6, otherwise="human")
MEANS = {"sure": -0.01, "middling": -0.4, "unsure": -2.0}
PROMPT = ChatPromptTemplate.from_template("{question}")
SEEN: list[UncertainAnswer] = []


def by_question(request, index):
    """The question says how sure the model is; ``unscored`` gets no score."""
    question = request["messages"][-1]["content"]
    mean = MEANS.get(question)
    return Reply(text=f"weak answer: {question}", uncertainty=None if mean is None else scored(mean))


@pytest.fixture(scope="module")
def weak():
    with running(by_question) as server:
        yield server


@pytest.fixture(scope="module")
def strong():
    with running(Reply(text="a strong answer", uncertainty=None)) as server:
        yield server


@pytest.fixture(autouse=True)
def _forget(weak, strong):
    for record in (weak.requests, strong.requests, SEEN):
        record.clear()


def ask_person(held: UncertainAnswer) -> AIMessage:
    SEEN.append(held)
    return AIMessage("a person's answer")


def model_of(server, **changes):
    return ChatOpenAI(**server.settings(**changes))


@pytest.fixture
def chain(weak, strong):
    route = route_by_uncertainty(model_of(weak), escalate=model_of(strong), human=ask_person, policy=POLICY)
    return PROMPT | route | StrOutputParser()


async def collected(pieces):
    return [piece async for piece in pieces]


WAYS = {
    "invoke": lambda chain, given: chain.invoke(given),
    "ainvoke": lambda chain, given: asyncio.run(chain.ainvoke(given)),
    "batch": lambda chain, given: chain.batch([given])[0],
    "abatch": lambda chain, given: asyncio.run(chain.abatch([given]))[0],
    "stream": lambda chain, given: "".join(chain.stream(given)),
    "astream": lambda chain, given: "".join(asyncio.run(collected(chain.astream(given)))),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_decision_takes_its_branch(chain, weak, strong, way):
    expected = {
        "sure": "weak answer: sure",
        "middling": "a strong answer",
        "unsure": "a person's answer",
        "unscored": "a person's answer",
    }
    assert {question: WAYS[way](chain, {"question": question}) for question in expected} == expected
    assert (len(weak.requests), len(strong.requests)) == (4, 1)
    # The stronger model is asked the same, and the person sees question, draft and reason.
    assert strong.requests[0]["messages"][-1]["content"] == "middling"
    held, unscored = SEEN
    assert held.input.to_messages()[0].content == "unsure"
    assert held.draft.text == "weak answer: unsure"
    assert held.uncertainty.to_dict() == scored(-2.0)
    assert held.decision.reason == "normalized.probability 0.1353 < 0.6"
    assert "not scored: skipped" in unscored.decision.reason


def test_batches_keep_their_order(chain):
    questions = [{"question": q} for q in ("unsure", "sure", "middling", "sure")]
    expected = ["a person's answer", "weak answer: sure", "a strong answer", "weak answer: sure"]
    assert chain.batch(questions) == expected
    assert asyncio.run(chain.abatch(questions)) == expected


def test_a_stream_has_the_pieces_of_what_passed_and_of_the_other_branch(chain):
    for question, pieces in (("sure", ["weak", " answer:", " sure"]), ("middling", ["a", " strong", " answer"])):
        assert [piece for piece in chain.stream({"question": question}) if piece] == pieces
        assert [p for p in asyncio.run(collected(chain.astream({"question": question}))) if p] == pieces


def test_the_draft_of_an_uncertain_answer_is_in_no_stream(weak):
    chain = PROMPT | route_by_uncertainty(model_of(weak), policy=POLICY)
    (message,) = chain.stream({"question": "unsure"})
    assert message.text == "I am not sure enough to answer that."
    assert message.response_metadata["uncertainty"]["log_probability"] == scored(-2.0)["log_probability"]


@pytest.mark.parametrize("question", ["sure", "unsure"])
def test_a_graph_around_it_streams_no_draft(weak, question):
    graph_module = pytest.importorskip("langgraph.graph")
    route = route_by_uncertainty(model_of(weak), policy=POLICY)
    builder = graph_module.StateGraph(graph_module.MessagesState)
    builder.add_node("answer", lambda state: {"messages": route.invoke(state["messages"])})
    builder.set_entry_point("answer")
    graph = builder.compile()
    given = {"messages": [("human", question)]}
    shown = [message.text for message, _ in graph.stream(given, stream_mode="messages")]
    assert shown == ["weak answer: sure" if question == "sure" else "I am not sure enough to answer that."]


def test_an_action_without_a_branch_abstains(weak):
    chain = PROMPT | route_by_uncertainty(model_of(weak), abstain="Pass.", policy=POLICY) | StrOutputParser()
    questions = ("sure", "middling", "unsure")
    assert [chain.invoke({"question": q}) for q in questions] == ["weak answer: sure", "Pass.", "Pass."]
    chain = PROMPT | route_by_uncertainty(
        model_of(weak), abstain=lambda held: f"{held.decision.action}?", policy=POLICY
    )
    assert [chain.invoke({"question": q}) for q in questions[1:]] == ["escalate?", "human?"]


def test_unscored_answers_may_pass(weak):
    route = route_by_uncertainty(model_of(weak), human=ask_person, policy=POLICY, on_unscored="pass")
    assert (PROMPT | route).invoke({"question": "unscored"}).text == "weak answer: unscored"
    with pytest.raises(ValueError, match="on_unscored='open' is unknown"):
        route_by_uncertainty(model_of(weak), policy=POLICY, on_unscored="open")


def test_without_a_policy_the_decision_of_the_handler_counts(weak):
    handler = UncertaintyCallbackHandler(POLICY)
    route = route_by_uncertainty(model_of(weak, callbacks=[handler]), human=ask_person)
    assert (PROMPT | route).invoke({"question": "sure"}).text == "weak answer: sure"
    assert (PROMPT | route).invoke({"question": "unsure"}).text == "a person's answer"
    assert "decided before" in SEEN[0].decision.reason
    bare = route_by_uncertainty(model_of(weak), human=ask_person)
    assert (PROMPT | bare).invoke({"question": "sure"}).text == "I am not sure enough to answer that."


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream"])
def test_structured_output_with_raw_is_read(way):
    class City(BaseModel):
        name: str

    for mean in (-0.01, -2.0):
        with running(Reply(text='{"name": "Paris"}', uncertainty=scored(mean))) as server:
            structured = model_of(server).with_structured_output(City, include_raw=True, method="json_schema")
            chain = route_by_uncertainty(structured, human=ask_person, policy=POLICY)
            if way == "stream":
                pieces = list(chain.stream("?"))
                result = pieces[0]
                for piece in pieces[1:]:
                    result = result + piece
            else:
                result = WAYS[way](chain, "?")
        if mean == -0.01:
            assert result["parsed"] == City(name="Paris")
        else:
            assert result.text == "a person's answer"
            assert SEEN[-1].draft["parsed"] == City(name="Paris")


def test_a_parser_before_the_route_is_a_mistake_that_is_named(weak):
    with pytest.raises(TypeError, match=r"gave \w+, which carries no uncertainty.*put output parsers behind"):
        route_by_uncertainty(model_of(weak) | StrOutputParser(), policy=POLICY).invoke("sure")


def test_runs_are_traced_under_the_route(chain):
    async def events():
        return [e async for e in chain.astream_events({"question": "middling"}, version="v2")]

    happened = asyncio.run(events())
    (route,) = {
        e["run_id"] for e in happened if e["name"] == "route_by_uncertainty" and e["event"] == "on_chain_start"
    }
    models = [e for e in happened if e["event"] == "on_chat_model_end"]
    assert [m["data"]["output"].text for m in models] == ["weak answer: middling", "a strong answer"]
    assert all(route in m["parent_ids"] for m in models)


def test_config_and_bound_arguments_reach_the_model(weak):
    route = route_by_uncertainty(model_of(weak), policy=POLICY)
    route.invoke("sure", temperature=0.25)
    assert weak.requests[-1]["temperature"] == 0.25
    route.bind(temperature=0.5).with_config(tags=["mine"]).invoke("sure")
    assert weak.requests[-1]["temperature"] == 0.5
