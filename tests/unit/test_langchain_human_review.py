"""Agents that ask a person where they are unsure: what is asked, what each decision does, what is never lost."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest

from gnuq_serve.policy import Policy

pytest.importorskip("langchain.agents")
pytest.importorskip("langgraph.checkpoint.sqlite")

from langchain.agents.middleware import HumanInTheLoopMiddleware
from langchain.agents.structured_output import ProviderStrategy, StructuredOutputValidationError, ToolStrategy
from langchain_core.messages import AIMessage, ToolMessage
from langchain_gnuq.gate import ABSTAIN_TEXT
from langchain_gnuq.middleware import AbstainWhenUncertain, AskHumanWhenUncertain, EscalateWhenUncertain
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.types import Command
from pydantic import ValidationError
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
from scripted_openai import scored

THREAD = {"configurable": {"thread_id": "1"}}
APPROVE = {"type": "approve"}


@pytest.fixture(scope="module", autouse=True)
def _servers():
    with idle_servers(2):
        yield


@pytest.fixture(autouse=True)
def _nothing_sent():
    SENT.clear()


@pytest.fixture(params=["sync", "async"])
def call(request):
    if request.param == "sync":
        return lambda agent, *args: agent.invoke(*args)
    return lambda agent, *args: asyncio.run(agent.ainvoke(*args))


def asking(server, *more, checkpointer=None, **settings):
    gate = AskHumanWhenUncertain(POLICY, text="No answer.")
    return agent(server, gate, *more, checkpointer=checkpointer or InMemorySaver(), **settings)


def decide(*decisions):
    return Command(resume={"decisions": list(decisions)})


def edit(name, **args):
    return {"type": "edit", "edited_action": {"name": name, "args": args}}


def question_of(state):
    (pause,) = state["__interrupt__"]
    return pause.value


def test_a_sure_answer_asks_nobody(call):
    with serving(reply(SURE)) as server:
        state = call(asking(server), HI, THREAD)
    assert "__interrupt__" not in state
    assert texts(state)[-1] == "Paris it is"


def test_what_is_asked_about_an_answer(call):
    with serving(reply(UNSURE)) as server:
        state = call(asking(server), HI, THREAD)
    assert question_of(state) == {
        "action_requests": [
            {
                "name": "answer",
                "args": {"text": "Paris it is"},
                "description": "Uncertain: normalized.probability 0.1353 < 0.6",
            }
        ],
        "review_configs": [
            {"action_name": "answer", "allowed_decisions": ["approve", "edit", "reject", "respond"]}
        ],
        "uncertainty": scored(UNSURE),
        "reason": "normalized.probability 0.1353 < 0.6",
    }
    # Nobody sees the draft meanwhile.
    assert texts(state) == ["Capital of France?", ""]
    assert gate_of(state["messages"][-1])["outcome"] == "waiting"
    assert "Paris" not in repr(state["messages"])


@pytest.mark.parametrize(
    ("decision", "text", "outcome"),
    [
        (decide(APPROVE), "Paris it is", "approved"),
        (decide(edit("answer", text="Paris.")), "Paris.", "edited"),
        (decide({"type": "respond", "message": "I say Paris."}), "I say Paris.", "responded"),
        (Command(resume="I say Paris."), "I say Paris.", "responded"),
        (decide({"type": "reject"}), "No answer.", "rejected"),
        (decide({"type": "reject", "message": "Ask the embassy."}), "Ask the embassy.", "rejected"),
    ],
)
def test_what_a_person_decides_about_an_answer(call, decision, text, outcome):
    with serving([reply(UNSURE), reply(SURE, "Next")]) as server:
        built = asking(server)
        call(built, HI, THREAD)
        state = call(built, decision, THREAD)
        assert len(server.requests) == 1  # the model is not asked again
        assert texts(state) == ["Capital of France?", text]
        message = state["messages"][-1]
        assert gate_of(message) == gate_of(message) | {"outcome": outcome, "action": "human"}
        assert message.usage_metadata["total_tokens"] == 5
        # A person's words carry no score.
        found = "uncertainty" in (message.response_metadata.get("logprobs") or {})
        assert found == (outcome == "approved")
        assert texts(call(built, HI, THREAD))[1:] == [text, "Capital of France?", "Next"]


def test_several_tool_calls_are_one_decision_of_the_gate_and_one_each_of_the_person(call):
    with serving([mail(UNSURE, "a@b", "c@d", "e@f", "g@h"), reply(SURE, "Done")]) as server:
        built = asking(server, tools=[send_mail])
        question = question_of(call(built, HI, THREAD))
        assert [request["args"] for request in question["action_requests"]] == [
            {"to": "a@b"},
            {"to": "c@d"},
            {"to": "e@f"},
            {"to": "g@h"},
        ]
        assert [config["action_name"] for config in question["review_configs"]] == ["send_mail"]
        assert SENT == []
        no, own = {"type": "reject", "message": "Not her."}, {"type": "respond", "message": "I wrote to them."}
        state = call(built, decide(APPROVE, edit("send_mail", to="x@y"), no, own), THREAD)
        assert sorted(SENT) == ["a@b", "x@y"]
        results = {m.tool_call_id: (m.text, m.status) for m in state["messages"] if isinstance(m, ToolMessage)}
        assert results == {
            "call_0": ("sent to a@b", "success"),
            "call_1": ("sent to x@y", "success"),
            "call_2": ("Not her.", "error"),
            "call_3": ("I wrote to them.", "success"),
        }
        assert texts(state)[-1] == "Done"
        # The model is told of the calls as they ran.
        sent = [call["function"]["arguments"] for call in server.requests[1]["messages"][1]["tool_calls"]]
        assert sent == ['{"to": "a@b"}', '{"to": "x@y"}', '{"to": "e@f"}', '{"to": "g@h"}']
        assert len(server.requests) == 2


def test_rejected_calls_go_back_to_the_model_whose_next_message_is_gated(call):
    with serving([mail(UNSURE, "a@b"), reply(UNSURE, "Lyon")]) as server:
        built = asking(server, tools=[send_mail])
        call(built, HI, THREAD)
        state = call(built, decide({"type": "reject"}), THREAD)
        assert "not run" in server.requests[1]["messages"][-1]["content"]
        assert question_of(state)["action_requests"][0]["args"] == {"text": "Lyon"}
        assert texts(call(built, decide(APPROVE), THREAD))[-1] == "Lyon"
        assert SENT == []


WRONG = [
    {"decisions": []},
    {"decisions": [APPROVE, APPROVE]},
    {"decisions": [{"type": "maybe"}]},
    {"decisions": [edit("answer")]},
    {"decisions": [{"type": "respond"}]},
    {"answer": "Paris"},
    7,
]


@pytest.mark.parametrize("wrong", WRONG, ids=range(len(WRONG)))
def test_a_malformed_decision_loses_nothing(call, wrong):
    with serving(reply(UNSURE)) as server:
        built = asking(server)
        call(built, HI, THREAD)
        with pytest.raises(ValidationError):
            call(built, Command(resume=wrong), THREAD)
        assert texts(call(built, decide(APPROVE), THREAD))[-1] == "Paris it is"
        assert len(server.requests) == 1


@pytest.mark.parametrize("strategy", [ToolStrategy(City), ProviderStrategy(City)], ids=["tool", "provider"])
@pytest.mark.parametrize("with_tools", [False, True])
def test_a_structured_response_is_approved_or_rejected(call, strategy, with_tools):
    if isinstance(strategy, ToolStrategy):
        draft = reply(UNSURE, "", tool_calls=[("City", {"name": "Lyon"})])
    else:
        draft = reply(UNSURE, '{"name": "Lyon"}')
    with serving(draft) as server:
        built = asking(server, response_format=strategy, tools=[send_mail] if with_tools else [])
        state = call(built, HI, THREAD)
        assert state.get("structured_response") is None
        assert "Lyon" in str(question_of(state)["action_requests"][0]["args"])
        assert question_of(state)["review_configs"][0]["allowed_decisions"] == ["approve", "reject"]
        with pytest.raises(ValidationError):
            call(built, Command(resume="Paris"), THREAD)
        assert call(built, decide(APPROVE), THREAD)["structured_response"] == City(name="Lyon")
        other = {"configurable": {"thread_id": "2"}}
        call(built, HI, other)
        state = call(built, decide({"type": "reject"}), other)
        assert (texts(state)[-1], state.get("structured_response")) == ("No answer.", None)
        assert len(server.requests) == 2


def test_a_structured_response_that_is_tried_again_is_nothing_to_ask_about():
    tries = [
        reply(UNSURE, "", tool_calls=[("City", {"town": 1})]),
        reply(SURE, "", tool_calls=[("City", {"name": "A"})]),
    ]
    with serving(tries) as server:
        state = asking(server, response_format=ToolStrategy(City)).invoke(HI, THREAD)
        assert state["structured_response"] == City(name="A")
        assert len(server.requests) == 2


def test_a_structured_response_beside_tool_calls_stands_or_falls_with_them(call):
    both = reply(UNSURE, "", tool_calls=[("City", {"name": "Lyon"}), ("send_mail", {"to": "a@b"})])
    with serving([both, both, reply(SURE, "", tool_calls=[("City", {"name": "Paris"})])]) as server:
        built = asking(server, response_format=ToolStrategy(City), tools=[send_mail])
        question = question_of(call(built, HI, THREAD))
        assert [request["name"] for request in question["action_requests"]] == ["City", "send_mail"]
        assert call(built, decide(APPROVE, APPROVE), THREAD)["structured_response"] == City(name="Lyon")
        assert SENT == ["a@b"]
        other = {"configurable": {"thread_id": "2"}}
        call(built, HI, other)
        state = call(built, decide(APPROVE, {"type": "reject", "message": "No mail."}), other)
        assert SENT == ["a@b"]
        assert [m.text for m in state["messages"] if isinstance(m, ToolMessage)][:2] == ["No mail."] * 2
        assert state["structured_response"] == City(name="Paris")  # the model's next try
        assert len(server.requests) == 3


def test_tool_calls_beside_a_structured_response_that_did_not_parse(call):
    both = reply(UNSURE, "", tool_calls=[("City", {"town": 1}), ("send_mail", {"to": "a@b"})])
    with serving([both, reply(SURE, "", tool_calls=[("City", {"name": "Paris"})])]) as server:
        built = asking(server, response_format=ToolStrategy(City), tools=[send_mail])
        question = question_of(call(built, HI, THREAD))
        assert [request["name"] for request in question["action_requests"]] == ["send_mail"]
        state = call(built, decide({"type": "reject", "message": "No mail."}), THREAD)
        assert state["structured_response"] == City(name="Paris")
        told = [m["content"] for m in server.requests[1]["messages"] if m["role"] == "tool"]
        assert "Failed to parse" in told[0]
        assert told[1:] == ["No mail."]
        assert SENT == []


def test_what_cannot_be_parsed_is_an_error_and_no_question(call):
    with serving(reply(UNSURE, "", tool_calls=[("City", {"town": 1})])) as server:
        built = asking(server, response_format=ToolStrategy(City, handle_errors=False))
        with pytest.raises(StructuredOutputValidationError):
            call(built, HI, THREAD)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_messages_stream_shows_the_draft_only_after_approval(asynchronous):
    def shown(built, given):
        if not asynchronous:
            return [message.text for message, _ in built.stream(given, THREAD, stream_mode="messages")]

        async def collect():
            return [m.text async for m, _ in built.astream(given, THREAD, stream_mode="messages")]

        return asyncio.run(collect())

    with serving(reply(UNSURE)) as server:
        built = asking(server)
        assert shown(built, HI) == [""]
        assert shown(built, decide(APPROVE)) == ["Paris it is"]
        assert len(server.requests) == 1


def test_another_process_with_another_policy_resumes_from_disk(tmp_path):
    """Each with a connection of its own to the file, and the second with a gate that would let the draft pass."""
    path = str(tmp_path / "runs.sqlite")
    with serving(mail(UNSURE, "a@b")) as server, SqliteSaver.from_conn_string(path) as first:
        question = question_of(asking(server, tools=[send_mail], checkpointer=first).invoke(HI, THREAD))
    with serving(reply(SURE, "Done")) as server, SqliteSaver.from_conn_string(path) as second:
        gate = AskHumanWhenUncertain(Policy(signal="normalized.probability", answer=0.0))
        built = agent(server, gate, tools=[send_mail], checkpointer=second)
        (pause,) = built.get_state(THREAD).interrupts
        assert pause.value == question
        state = built.invoke(decide(edit("send_mail", to="x@y")), THREAD)
        assert SENT == ["x@y"]
        assert texts(state) == ["Capital of France?", "", "sent to x@y", "Done"]
        assert len(server.requests) == 1
    with sqlite3.connect(path) as file:
        assert file.execute("select count(*) from checkpoints").fetchone()[0] > 3


def test_another_event_loop_resumes_a_structured_response_from_disk(tmp_path):
    path = str(tmp_path / "runs.sqlite")

    async def once(server, given):
        async with AsyncSqliteSaver.from_conn_string(path) as saver:
            built = asking(server, response_format=ToolStrategy(City), checkpointer=saver)
            return await built.ainvoke(given, THREAD)

    with serving(reply(UNSURE, "", tool_calls=[("City", {"name": "Lyon"})])) as server:
        assert question_of(asyncio.run(once(server, HI)))["action_requests"][0]["args"] == {"name": "Lyon"}
        assert asyncio.run(once(server, decide(APPROVE)))["structured_response"] == City(name="Lyon")
        assert len(server.requests) == 1


def test_a_new_question_in_place_of_a_decision_drops_the_draft(call):
    with serving([reply(UNSURE, "Lyon"), reply(SURE, "Paris")]) as server:
        built = asking(server)
        call(built, HI, THREAD)
        state = call(built, HI, THREAD)
    assert texts(state) == ["Capital of France?", "", "Capital of France?", "Paris"]
    assert "__interrupt__" not in state


def test_with_a_stronger_model_the_person_sees_what_that_is_unsure_of_too(call):
    with serving(reply(UNSURE)) as weak, serving(reply(MIDDLING, "Paris, I think")) as strong:
        built = asking(weak, EscalateWhenUncertain(model_of(strong), POLICY))
        question = question_of(call(built, HI, THREAD))
        assert question["action_requests"][0]["args"] == {"text": "Paris, I think"}
        assert texts(call(built, decide(APPROVE), THREAD))[-1] == "Paris, I think"
        assert (len(weak.requests), len(strong.requests)) == (1, 1)


def test_what_waits_for_a_person_is_left_alone_by_gates_further_out(call):
    with serving(reply(UNSURE)) as server:
        built = agent(
            server, AbstainWhenUncertain(POLICY), AskHumanWhenUncertain(POLICY), checkpointer=InMemorySaver()
        )
        assert question_of(call(built, HI, THREAD))["action_requests"][0]["args"] == {"text": "Paris it is"}
        assert texts(call(built, decide({"type": "reject"}), THREAD))[-1] == ABSTAIN_TEXT


def test_langchains_own_approval_comes_after_ours(call):
    """Listed before our gate, it sees the calls that a person has let through here."""
    with serving([mail(UNSURE, "a@b"), reply(SURE, "Done")]) as server:
        gates = [HumanInTheLoopMiddleware({"send_mail": True}), AskHumanWhenUncertain(POLICY)]
        built = agent(server, *gates, tools=[send_mail], checkpointer=InMemorySaver())
        assert "uncertainty" in question_of(call(built, HI, THREAD))
        question = question_of(call(built, decide(APPROVE), THREAD))
        assert "uncertainty" not in question
        assert question["action_requests"][0]["args"] == {"to": "a@b"}
        state = call(built, decide(APPROVE), THREAD)
        assert SENT == ["a@b"]
        assert texts(state)[-1] == "Done"


def test_an_unscored_answer_is_asked_about_unless_it_may_pass():
    with serving(reply(None)) as server:
        question = question_of(asking(server).invoke(HI, THREAD))
        assert "not scored: skipped" in question["reason"]
        gate = AskHumanWhenUncertain(POLICY, on_unscored="pass")
        assert texts(agent(server, gate, checkpointer=InMemorySaver()).invoke(HI, THREAD))[-1] == "Paris it is"


def test_an_abandoned_tool_call_is_no_tool_call(call):
    """No message with a call and without its result stays in the history, which servers refuse."""
    with serving([mail(UNSURE, "a@b"), reply(SURE)]) as server:
        built = asking(server, tools=[send_mail])
        call(built, HI, THREAD)
        state = call(built, HI, THREAD)
    assert not any(m.tool_calls for m in state["messages"] if isinstance(m, AIMessage))
    assert SENT == []
