"""Agents whose model is unsure abstain, or ask a stronger model: stock clients, real HTTP, scripted answers."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys

import pytest

from gnuq_serve.policy import Policy
from gnuq_serve.uncertainty import Uncertainty

pytest.importorskip("langchain.agents")

from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain.agents.structured_output import ProviderStrategy, StructuredOutputValidationError, ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_gnuq import ChatGnuq
from langchain_gnuq.gate import ABSTAIN_TEXT
from langchain_gnuq.middleware import AbstainWhenUncertain, EscalateWhenUncertain
from langgraph.checkpoint.memory import InMemorySaver
from scripted_agents import (
    HI,
    MIDDLING,
    POLICY,
    SENT,
    SURE,
    UNSURE,
    City,
    agent,
    gate_of,
    idle_servers,
    mail,
    model_of,
    reply,
    send_mail,
    serving,
    texts,
)
from scripted_openai import Reply, scored


@pytest.fixture(scope="module", autouse=True)
def _servers():
    with idle_servers():
        yield


@pytest.fixture(autouse=True)
def _nothing_sent():
    SENT.clear()


@pytest.fixture(params=["sync", "async"])
def call(request):
    """``call(agent, input, config)``: the final state."""
    if request.param == "sync":
        return lambda agent, *args: agent.invoke(*args)
    return lambda agent, *args: asyncio.run(agent.ainvoke(*args))


def test_a_sure_answer_passes_untouched(call):
    with serving(reply(SURE)) as server:
        plain = call(agent(server), HI)["messages"][-1]
        for middleware in (AbstainWhenUncertain(POLICY), EscalateWhenUncertain(model_of(server), POLICY)):
            message = call(agent(server, middleware), HI)["messages"][-1]
            assert (message.content, message.response_metadata) == (plain.content, plain.response_metadata)
        assert len(server.requests) == 3


def test_an_uncertain_answer_becomes_an_abstention(call):
    with serving(reply(UNSURE)) as server:
        state = call(agent(server, AbstainWhenUncertain(POLICY, text="Don't know.")), HI)
    assert texts(state) == ["Capital of France?", "Don't know."]
    message = state["messages"][-1]
    assert message.response_metadata["uncertainty"] == scored(UNSURE)
    assert message.usage_metadata["total_tokens"] == 5
    assert gate_of(message) == {
        "outcome": "abstained",
        "action": "human",
        "signal": "normalized.probability",
        "value": pytest.approx(0.1353, abs=1e-4),
        "calibration": "uncalibrated",
        "reason": "normalized.probability 0.1353 < 0.6",
    }
    assert "Paris" not in repr(state)


def test_an_uncertain_tool_call_is_not_run_and_the_run_ends(call):
    with serving([mail(UNSURE, "a@b", "c@d"), reply(SURE)]) as server:
        state = call(agent(server, AbstainWhenUncertain(POLICY), tools=[send_mail]), HI)
        assert len(server.requests) == 1
    assert texts(state) == ["Capital of France?", ABSTAIN_TEXT]
    assert state["messages"][-1].tool_calls == []
    assert SENT == []


def test_a_sure_tool_call_runs_and_the_answer_after_it_is_gated_by_itself(call):
    with serving([mail(SURE, "a@b"), reply(UNSURE)]) as server:
        state = call(agent(server, AbstainWhenUncertain(POLICY), tools=[send_mail]), HI)
    assert texts(state) == ["Capital of France?", "", "sent to a@b", ABSTAIN_TEXT]
    assert SENT == ["a@b"]


@pytest.mark.parametrize(
    ("gated", "sent", "last"), [("answers", ["a@b"], ABSTAIN_TEXT), ("tool_calls", [], None)]
)
def test_answers_or_tool_calls_alone(gated, sent, last):
    other = {"answers": "tool_calls", "tool_calls": "answers"}[gated]
    middleware = AbstainWhenUncertain(POLICY, **{other: False})
    with serving([mail(UNSURE, "a@b"), reply(UNSURE)]) as server:
        state = agent(server, middleware, tools=[send_mail]).invoke(HI)
        assert sent == SENT
        assert state["messages"][-1].text == ABSTAIN_TEXT
    if last is None:  # an answer passes where only tool calls are gated
        with serving(reply(UNSURE)) as server:
            assert texts(agent(server, middleware, tools=[send_mail]).invoke(HI))[-1] == "Paris it is"


def test_a_stronger_model_does_it_again(call):
    with serving(reply(UNSURE)) as weak, serving(reply(None, "Paris, surely")) as strong:
        state = call(agent(weak, EscalateWhenUncertain(model_of(strong), POLICY)), HI)
        assert len(weak.requests) == len(strong.requests) == 1
        assert strong.requests[0]["messages"] == weak.requests[0]["messages"]
    assert texts(state) == ["Capital of France?", "Paris, surely"]
    assert gate_of(state["messages"][-1])["outcome"] == "escalated"
    assert gate_of(state["messages"][-1])["reason"] == "normalized.probability 0.1353 < 0.6"


def test_a_stronger_model_calls_the_tools_instead(call):
    with (
        serving([mail(UNSURE, "wrong@b"), reply(SURE, "Done")]) as weak,
        serving(mail(None, "right@b")) as strong,
    ):
        state = call(agent(weak, EscalateWhenUncertain(model_of(strong), POLICY), tools=[send_mail]), HI)
        assert [t["function"]["name"] for t in strong.requests[0]["tools"]] == ["send_mail"]
    assert SENT == ["right@b"]
    assert texts(state)[-1] == "Done"
    assert "wrong@b" not in repr(state)


def test_an_error_of_the_stronger_model_is_the_runs(call):
    with serving(reply(UNSURE)) as weak, serving(Reply(status=500)) as strong:
        middleware = EscalateWhenUncertain(model_of(strong), POLICY)
        with pytest.raises(Exception, match="scripted"):
            call(agent(weak, middleware), HI)


UNSCORED = [
    None,
    Uncertainty.skipped("the queue is full").to_dict(),
    Uncertainty.failed("died").to_dict(),
    {"status": 3},
]
UNSCORED += [scored(SURE) | {"normalized": {"probability": "high"}}]


@pytest.mark.parametrize("data", UNSCORED, ids=range(len(UNSCORED)))
def test_an_unscored_answer_is_uncertain_unless_it_may_pass(data):
    with serving(Reply(text="Paris", uncertainty=data)) as server, serving(reply(None, "strong")) as strong:
        model = model_of(strong)
        for middleware, held in ((AbstainWhenUncertain, ABSTAIN_TEXT), (EscalateWhenUncertain, "strong")):
            first = [model] if middleware is EscalateWhenUncertain else []
            state = agent(server, middleware(*first, POLICY)).invoke(HI)
            assert texts(state)[-1] == held
            assert gate_of(state["messages"][-1])["action"] == "human"  # the policy's otherwise
            assert "not scored" in gate_of(state["messages"][-1])["reason"]
            state = agent(server, middleware(*first, POLICY, on_unscored="pass")).invoke(HI)
            assert texts(state)[-1] == "Paris"
            assert gate_of(state["messages"][-1]) is None


def test_a_policy_that_answers_below_its_thresholds_does_not_answer_what_was_never_scored():
    policy = Policy(signal="normalized.probability", answer=0.8, escalate=0.6, otherwise="answer")
    last = []
    for mean in (UNSURE, None):
        with serving(reply(mean)) as server:
            last.append(texts(agent(server, AbstainWhenUncertain(policy)).invoke(HI))[-1])
    assert last == ["Paris it is", ABSTAIN_TEXT]


def test_without_a_policy_the_decision_that_came_counts():
    middleware = AbstainWhenUncertain()
    decided = [scored(UNSURE, decision="answer", p_correct=0.9), scored(SURE, decision="abstain"), scored(SURE)]
    last = []
    for data in decided:
        with serving(Reply(uncertainty=data)) as server:
            state = agent(server, middleware).invoke(HI)
        last.append((state["messages"][-1].text, (gate_of(state["messages"][-1]) or {}).get("reason")))
    assert last == [
        ("Paris", None),
        (ABSTAIN_TEXT, "decided before it came here"),
        (
            ABSTAIN_TEXT,
            "the answer carries no decision: calibrate the server, or give a policy; on_unscored='uncertain'",
        ),
    ]


def test_gates_may_share_the_policys_decisions():
    def last(mean):
        with serving(reply(mean)) as weak, serving(reply(SURE, "strong")) as strong:
            gates = [
                AbstainWhenUncertain(POLICY, acts_on={"human", "abstain"}),
                EscalateWhenUncertain(model_of(strong), POLICY, acts_on={"escalate"}),
            ]
            return [agent(weak, *order).invoke(HI)["messages"][-1].text for order in (gates, gates[::-1])]

    assert last(SURE) == ["Paris it is"] * 2
    assert last(MIDDLING) == ["strong"] * 2
    assert last(UNSURE) == [ABSTAIN_TEXT] * 2


def test_a_gate_further_out_looks_at_the_escalated_answer_and_not_at_an_abstention():
    with serving(reply(UNSURE)) as weak, serving(reply(MIDDLING, "strong")) as strong:
        escalate = EscalateWhenUncertain(model_of(strong), POLICY)
        state = agent(weak, AbstainWhenUncertain(POLICY), escalate).invoke(HI)
        assert texts(state)[-1] == ABSTAIN_TEXT
        assert gate_of(state["messages"][-1])["value"] == pytest.approx(0.6703, abs=1e-4)  # the stronger model's
        assert len(strong.requests) == 1
        state = agent(weak, escalate, AbstainWhenUncertain(POLICY)).invoke(HI)
        assert texts(state)[-1] == ABSTAIN_TEXT
        assert len(strong.requests) == 1


def streamed(built, asynchronous, mode="messages"):
    if not asynchronous:
        return [message for message, _ in built.stream(HI, stream_mode=mode)]

    async def collect():
        return [message async for message, _ in built.astream(HI, stream_mode=mode)]

    return asyncio.run(collect())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_messages_stream_shows_no_draft(asynchronous):
    with serving(reply(UNSURE)) as weak, serving(reply(MIDDLING, "Lyon, surely")) as strong:
        escalate = EscalateWhenUncertain(model_of(strong), POLICY)
        chunks = streamed(agent(weak, AbstainWhenUncertain(POLICY)), asynchronous)
        assert [chunk.text for chunk in chunks] == [ABSTAIN_TEXT]
        chunks = streamed(agent(weak, escalate), asynchronous)
        assert "".join(chunk.text for chunk in chunks) == "Lyon, surely"
        assert len([chunk for chunk in chunks if chunk.text]) == 2  # token by token
        # The answer of the stronger model is a draft for a gate further out.
        chunks = streamed(agent(weak, AbstainWhenUncertain(POLICY), escalate), asynchronous)
        assert [chunk.text for chunk in chunks] == [ABSTAIN_TEXT]


def test_a_messages_stream_shows_a_passed_answer_whole_and_once():
    with serving(reply(SURE)) as server:
        assert [c.text for c in streamed(agent(server, AbstainWhenUncertain(POLICY)), False)] == ["Paris it is"]


def test_shown_drafts_are_followed_by_the_abstention():
    with serving(reply(UNSURE)) as server:
        chunks = streamed(agent(server, AbstainWhenUncertain(POLICY, hide_drafts=False)), False)
    assert "".join(chunk.text for chunk in chunks) == "Paris it is" + ABSTAIN_TEXT
    assert len({chunk.id for chunk in chunks}) == 2


def test_the_newer_stream_of_messages_shows_no_draft_either():
    with serving(reply(UNSURE)) as server:
        for hide, shown in ((True, [ABSTAIN_TEXT]), (False, ["Paris it is", ABSTAIN_TEXT])):
            built = agent(server, AbstainWhenUncertain(POLICY, hide_drafts=hide))
            run = built.stream_events(HI, version="v3")
            assert ["".join(message.text) for message in run.messages] == shown


@pytest.mark.parametrize("strategy", [ToolStrategy(City), ProviderStrategy(City)], ids=["tool", "provider"])
@pytest.mark.parametrize("with_tools", [False, True])
def test_a_structured_response_is_an_answer(call, strategy, with_tools):
    def structured(mean, name):
        if isinstance(strategy, ToolStrategy):
            return reply(mean, "", tool_calls=[("City", {"name": name})])
        return reply(mean, json.dumps({"name": name}))

    settings = {"response_format": strategy, "tools": [send_mail] if with_tools else []}
    gates_calls_only = AbstainWhenUncertain(POLICY, answers=False)
    with serving(structured(SURE, "Paris")) as server:
        state = call(agent(server, AbstainWhenUncertain(POLICY), **settings), HI)
        assert state["structured_response"] == City(name="Paris")
    with serving(structured(UNSURE, "Lyon")) as server, serving(structured(None, "Paris")) as strong:
        state = call(agent(server, AbstainWhenUncertain(POLICY), **settings), HI)
        assert texts(state) == ["Capital of France?", ABSTAIN_TEXT]
        assert state.get("structured_response") is None
        state = call(agent(server, gates_calls_only, **settings), HI)
        assert state["structured_response"] == City(name="Lyon")
        state = call(agent(server, EscalateWhenUncertain(model_of(strong), POLICY), **settings), HI)
        assert state["structured_response"] == City(name="Paris")
        assert "Lyon" not in repr(state)


def test_an_abstention_ends_the_run_also_before_another_middlewares_after_model():
    class Outer(AgentMiddleware):
        def after_model(self, state, runtime):
            return None

    with serving(reply(UNSURE, "", tool_calls=[("City", {"name": "Lyon"})])) as server:
        for order in ([Outer(), AbstainWhenUncertain(POLICY)], [AbstainWhenUncertain(POLICY), Outer()]):
            state = agent(server, *order, response_format=ToolStrategy(City)).invoke(HI)
            assert texts(state) == ["Capital of France?", ABSTAIN_TEXT]
        assert len(server.requests) == 2


def test_what_cannot_be_parsed_is_gated_first(call):
    strategy = ToolStrategy(City, handle_errors=False)
    with serving(reply(UNSURE, "", tool_calls=[("City", {"town": 1})])) as bad:
        state = call(agent(bad, AbstainWhenUncertain(POLICY), response_format=strategy), HI)
        assert texts(state)[-1] == ABSTAIN_TEXT
        with serving(reply(None, "", tool_calls=[("City", {"name": "Paris"})])) as strong:
            state = call(
                agent(bad, EscalateWhenUncertain(model_of(strong), POLICY), response_format=strategy), HI
            )
            assert state["structured_response"] == City(name="Paris")
        # It is an answer, although it came as a tool call.
        state = call(agent(bad, AbstainWhenUncertain(POLICY, tool_calls=False), response_format=strategy), HI)
        assert texts(state)[-1] == ABSTAIN_TEXT
        built = agent(bad, AbstainWhenUncertain(POLICY, answers=False), response_format=strategy)
        with pytest.raises(StructuredOutputValidationError):
            call(built, HI)
    with serving(reply(SURE, "", tool_calls=[("City", {"town": 1})])) as bad:
        built = agent(bad, AbstainWhenUncertain(POLICY), response_format=strategy)
        with pytest.raises(StructuredOutputValidationError):
            call(built, HI)


def test_a_conversation_goes_on_after_an_abstention(call):
    with serving(
        [reply(UNSURE, "Lyon"), reply(SURE, "Berlin"), mail(SURE, "a@b"), reply(SURE, "Done")]
    ) as server:
        built = agent(server, AbstainWhenUncertain(POLICY), tools=[send_mail], checkpointer=InMemorySaver())
        config = {"configurable": {"thread_id": "1"}}
        for _ in range(3):
            state = call(built, HI, config)
        assert [m.text for m in state["messages"] if isinstance(m, AIMessage)] == [
            ABSTAIN_TEXT,
            "Berlin",
            "",
            "Done",
        ]
        assert SENT == ["a@b"]
        assert [m["content"] for m in server.requests[1]["messages"]][1] == ABSTAIN_TEXT


def test_chat_gnuq_brings_its_own_decision(call):
    with serving([reply(SURE), reply(UNSURE, "Lyon")]) as server:
        model = ChatGnuq(**server.settings(), policy=POLICY)
        built = create_agent(model, middleware=[AbstainWhenUncertain()])
        sure, unsure = (call(built, HI)["messages"][-1] for _ in range(2))
    assert sure.text == "Paris it is"
    assert sure.response_metadata["uncertainty"]["decision"] == "answer"
    assert unsure.text == ABSTAIN_TEXT
    assert gate_of(unsure)["reason"] == "decided before it came here"
    assert unsure.response_metadata["uncertainty"]["decision"] == "human"


def test_the_state_of_an_agent_holds_real_messages():
    with serving([mail(SURE, "a@b"), reply(SURE, "Done")]) as server:
        state = agent(server, AbstainWhenUncertain(POLICY), tools=[send_mail]).invoke(HI)
    assert [type(message) for message in state["messages"]] == [HumanMessage, AIMessage, ToolMessage, AIMessage]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="on_unscored='drop' is unknown; choose 'pass' or 'uncertain'"):
        AbstainWhenUncertain(POLICY, on_unscored="drop")
    with pytest.raises(ValueError, match="nothing would be gated"):
        AbstainWhenUncertain(POLICY, answers=False, tool_calls=False)
    for wrong in ({"answer"}, set(), "human", {"maybe"}):
        with pytest.raises(ValueError, match="give some of abstain, escalate, human"):
            AbstainWhenUncertain(POLICY, acts_on=wrong)


def test_without_langchain_the_import_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("langchain_gnuq.middleware")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "langchain.agents.middleware", None)
    with pytest.raises(ImportError, match=r"pip install 'langchain-gnuq\[agents\]'"):
        importlib.import_module("langchain_gnuq.middleware")
