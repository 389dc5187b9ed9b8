"""ChatGnuq against a real HTTP server that answers as gnuq-serve does."""

from __future__ import annotations

import asyncio
import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, CallbackManager
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import ConfigurableField
from langchain_gnuq import ChatGnuq, UncertaintyCallbackHandler, UnscoredAnswerError, __version__
from made_calibration import made_calibration, saved
from pydantic import BaseModel, ValidationError
from scripted_openai import Reply, ScriptedServer, running, scored

from gnuq_serve.calibration.artefact import Seen
from gnuq_serve.policy import Policy
from gnuq_serve.uncertainty import Uncertainty

POLICY = Policy(signal="normalized.probability", answer=0.8, escalate=0.6, otherwise="human")
SCORED = [scored(mean) for mean in (-0.01, -0.4, -2.0)]


@pytest.fixture(scope="module")
def one_server() -> Iterator[ScriptedServer]:
    """For all tests: a client takes a tenth of a second for each new address."""
    with running(Reply()) as server:
        yield server


@pytest.fixture
def server(one_server: ScriptedServer) -> ScriptedServer:
    """Choice i carries ``SCORED[i]``."""
    one_server.reply = lambda request, index: Reply(uncertainty=SCORED[index])
    one_server.requests.clear()
    return one_server


def chat(server: ScriptedServer, **changes: Any) -> ChatGnuq:
    return ChatGnuq(**server.settings(**changes))


def found(message: Any) -> dict[str, Any]:
    return message.response_metadata["uncertainty"]


def test_a_message_carries_the_servers_object_once(server):
    metadata = chat(server).invoke("?").response_metadata
    assert metadata["uncertainty"] == SCORED[0]
    # As vLLM itself answers where no logprobs were asked for.
    assert metadata["logprobs"] is None


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("ask", ["invoke", "ainvoke", "stream", "astream"])
def test_the_object_is_found_with_and_without_the_mirror(ask, mirror):
    with running(Reply("Paris it is"), mirror) as server:
        model = chat(server, policy=POLICY)

        async def collect() -> list[Any]:
            return [chunk async for chunk in model.astream("?")]

        if ask == "invoke":
            message = model.invoke("?")
        elif ask == "ainvoke":
            message = asyncio.run(model.ainvoke("?"))
        else:
            chunks = asyncio.run(collect()) if ask == "astream" else list(model.stream("?"))
            assert ["uncertainty" in chunk.response_metadata for chunk in chunks] == [False] * (
                len(chunks) - 1
            ) + [True]
            assert [chunk.chunk_position for chunk in chunks[-2:]] == [None, "last"]
            message = sum(chunks[1:], start=chunks[0])
            # The score's own chunk does not show: role, three words, finish, usage, and the last.
            assert len(chunks) == 7
            assert not message.response_metadata.get("logprobs")
    assert message.text == "Paris it is"
    assert message.usage_metadata["input_tokens"] == 3
    assert found(message) == SCORED[0] | {"decision": "answer", "calibration": "uncalibrated"}


def test_logprobs_that_were_asked_for_stay(server):
    real = {"content": [{"token": "Paris", "logprob": -0.1, "bytes": None, "top_logprobs": []}], "refusal": None}
    server.reply = Reply(fields={"logprobs": real | {"uncertainty": SCORED[0]}})
    message = chat(server, logprobs=True).invoke("?")
    assert message.response_metadata["logprobs"] == real
    assert found(message) == SCORED[0]


def test_each_choice_has_its_own(server):
    model = chat(server, n=3, policy=POLICY)
    (generations,) = model.generate([[HumanMessage("?")]]).generations
    assert [found(generation.message)["decision"] for generation in generations] == [
        "answer",
        "escalate",
        "human",
    ]


@pytest.mark.parametrize(
    ("settings", "of_call", "sent"),
    [
        ({}, {}, None),
        ({"uncertainty": {"mode": "answer_only", "trace": True}}, {}, {"mode": "answer_only", "trace": True}),
        ({"uncertainty": False}, {}, False),
        ({"uncertainty": False}, {"uncertainty": {"trace": True}}, {"trace": True}),
        ({"uncertainty": True, "extra_body": {"top_k": 3}}, {}, True),
        ({"uncertainty": True, "extra_body": {"uncertainty": False}}, {}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_how_to_score_goes_out_with_the_request(server, settings, of_call, sent, stream):
    model = chat(server, **settings)
    list(model.stream("?", **of_call)) if stream else model.invoke("?", **of_call)
    (request,) = server.requests
    assert request.get("uncertainty") == sent
    assert request.get("top_k") == (3 if "top_k" in settings.get("extra_body", {}) else None)
    assert model.bind(uncertainty=False).invoke("?").text == "Paris"
    assert server.requests[-1]["uncertainty"] is False


def test_structured_output_is_asked_for_as_the_user_says(server):
    class City(BaseModel):
        name: str

    server.reply = Reply('{"name": "Paris"}')
    model, run_id = chat(server, policy=POLICY, uncertainty={"trace": True}), uuid.uuid4()
    assert model.with_structured_output(City).invoke("?", {"run_id": run_id}) == City(name="Paris")
    assert model.uncertainty_of(run_id).decision == "answer"
    assert server.requests[-1]["uncertainty"] == {"trace": True}
    server.reply = Reply("", tool_calls=[("City", {"name": "Paris"})])
    by_tool = model.with_structured_output(City, method="function_calling", include_raw=True).invoke("?")
    assert by_tool["parsed"] == City(name="Paris")
    assert found(by_tool["raw"])["decision"] == "answer"


def test_a_stream_is_asked_for_with_the_run_id_of_its_chain(server):
    model, run_id = chat(server), uuid.uuid4()
    assert "".join((model | StrOutputParser()).stream("?", {"run_id": run_id})) == "Paris"
    assert model.uncertainty_of(str(run_id)) == Uncertainty.from_dict(SCORED[0])
    assert model.uncertainty_of(uuid.uuid4()) is None


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_go_there_and_back(server, stream):
    def capital_of(country: str) -> str:
        """The capital of a country."""
        return "Paris"

    calls = [("capital_of", {"country": "France"}), ("capital_of", {"country": "Spain"})]
    server.reply = [Reply("", tool_calls=calls, uncertainty=scored(-2.0, tool_call=True)), Reply("Paris")]
    model = chat(server, policy=POLICY).bind_tools([capital_of])

    def ask(messages: list[Any]) -> Any:
        if not stream:
            return model.invoke(messages)
        chunks = list(model.stream(messages))
        return sum(chunks[1:], start=chunks[0])

    question = HumanMessage("Capitals of France and Spain?")
    message = ask([question])
    assert [(call["name"], call["args"]) for call in message.tool_calls] == calls
    assert found(message)["tool_call"] is True
    assert found(message)["decision"] == "human"
    results = [ToolMessage("Paris", tool_call_id=call["id"]) for call in message.tool_calls]
    assert ask([question, message, *results]).text == "Paris"
    # Our object is no part of a conversation that goes back to the server.
    assert "uncertainty" not in json.dumps(server.requests[-1])
    roles = [sent["role"] for sent in server.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "tool", "tool"]


def test_callbacks_of_the_user_see_the_score_and_are_kept(server):
    class Listener(BaseCallbackHandler):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_llm_new_token(self, token: Any, *, chunk: Any = None, **kwargs: Any) -> None:
            if chunk.message.chunk_position == "last":
                self.seen.append(found(chunk.message)["status"])

        def on_llm_end(self, response: Any, **kwargs: Any) -> None:
            self.seen.append(found(response.generations[0][0].message)["status"])

    for make in (lambda listener: [listener], lambda listener: CallbackManager([listener])):
        listener, run_id = Listener(), uuid.uuid4()
        model = chat(server, callbacks=make(listener))
        model.invoke("?", {"run_id": run_id})
        assert listener.seen == ["scored"]
        list(model.stream("?"))
        assert listener.seen == ["scored"] * 3
        assert model.uncertainty_of(run_id) is not None


def test_a_handler_on_top_may_decide(server):
    message = chat(server, callbacks=[UncertaintyCallbackHandler(POLICY)]).invoke("?")
    assert found(message)["decision"] == "answer"


def test_a_copy_with_another_policy_goes_by_it(server):
    model = chat(server, policy=POLICY)
    assert found(model.invoke("?"))["decision"] == "answer"
    stricter = model.model_copy(update={"policy": Policy(signal="normalized.probability", answer=0.999)})
    assert found(stricter.invoke("?"))["decision"] == "abstain"
    field = model.configurable_fields(policy=ConfigurableField(id="policy"))
    stricter = field.with_config(configurable={"policy": {"signal": "normalized.probability", "answer": 0.999}})
    assert found(stricter.invoke("?"))["decision"] == "abstain"


def test_an_answer_without_a_score(server):
    server.reply = Reply(uncertainty=None)
    model = chat(server)
    assert found(model.invoke("?"))["status"] == "skipped"
    assert found(list(model.stream("?"))[-1])["status"] == "skipped"
    closed = chat(server, on_failure="closed")
    with pytest.raises(UnscoredAnswerError, match="not a gnuq-serve server"):
        closed.invoke("?")
    with pytest.raises(UnscoredAnswerError):
        asyncio.run(closed.ainvoke("?"))
    with pytest.raises(UnscoredAnswerError):
        list(closed.stream("?"))
    backed = closed.with_fallbacks([chat(server)], exceptions_to_handle=(UnscoredAnswerError,))
    assert backed.invoke("?").text == "Paris"


@pytest.mark.parametrize("data", ["scored", 7, {}, {"status": "done"}, SCORED[0] | {"warnings": 5}], ids=str)
def test_a_malformed_object_costs_no_answer(server, data):
    server.reply = Reply(uncertainty=data)
    model = chat(server, policy=POLICY)
    for message in (model.invoke("?"), list(model.stream("?"))[-1]):
        assert found(message)["status"] == "failed"
        assert found(message)["reason"].startswith("the uncertainty object is malformed: ")


def test_a_cache_hit_is_scored_and_options_are_part_of_its_key(server):
    model = chat(server, cache=InMemoryCache(), policy=POLICY)
    run_id = uuid.uuid4()
    assert found(model.invoke("?")) == found(model.invoke("?", {"run_id": run_id}))
    assert model.uncertainty_of(run_id).decision == "answer"
    assert len(server.requests) == 1
    model.invoke("?", uncertainty={"trace": True})
    assert len(server.requests) == 2


def of_handler(server: ScriptedServer, **parts: Any) -> Any:
    from langchain_openai import ChatOpenAI

    handler = UncertaintyCallbackHandler(**parts)
    return ChatOpenAI(**server.settings(stream_usage=True), callbacks=[handler])


def of_model(server: ScriptedServer, **parts: Any) -> Any:
    return chat(server, **parts)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("make", [of_handler, of_model])
def test_a_calibration_on_the_clients_side(server, make, stream):
    calibration = made_calibration(
        seen=Seen(prompt_tokens=(1, 10), turns=(1, 1), finish_reasons=("stop",)),
    )

    def ask(model: Any, *turns: str) -> dict[str, Any]:
        messages = [HumanMessage(turn) for turn in turns]
        return found(list(model.stream(messages))[-1] if stream else model.invoke(messages))

    model = make(server, calibration=calibration)
    sure = ask(model, "?")
    assert sure["p_correct"] == pytest.approx(1 / (1 + math.exp(-1.25 * (-0.01 + 1.0) / 0.5)))
    assert (sure["decision"], sure["calibration"]) == ("answer", calibration.id)
    server.reply = Reply(uncertainty=SCORED[2])
    assert ask(model, "?")["decision"] == "abstain"
    # Outside of what it has seen: turns, the length of the prompt, why the answer ended.
    server.reply = Reply()
    for outside in (
        ask(model, "?", "and?"),
        ask(make(server, calibration=made_calibration(seen=Seen(prompt_tokens=(4, 9)))), "?"),
        ask(make(server, calibration=made_calibration(seen=Seen(finish_reasons=("length",)))), "?"),
    ):
        assert outside["p_correct"] is None
        assert outside["decision"] is None
        assert "does not apply" in outside["warnings"][0]
    # A policy goes by its p_correct; one by hand is named after what its signal rests on.
    escalating = make(server, calibration=calibration, policy=Policy(answer=0.999, escalate=0.5))
    assert ask(escalating, "?")["decision"] == "escalate"
    promised = Policy.from_calibration(calibration, otherwise="human")
    server.reply = Reply(uncertainty=SCORED[2])
    person = ask(make(server, calibration=calibration, policy=promised), "?")
    assert (person["decision"], person["calibration"]) == ("human", calibration.id)
    by_hand = ask(make(server, calibration=calibration, policy=POLICY), "?")
    assert (by_hand["decision"], by_hand["calibration"]) == ("human", "uncalibrated")


@pytest.mark.parametrize("make", [of_handler, of_model])
def test_what_the_server_has_decided_stays_unless_a_policy_is_given(server, make):
    decided = scored(-2.0, p_correct=0.4, decision="answer", calibration="servers@1234")
    server.reply = Reply(uncertainty=decided)
    assert found(make(server, calibration=made_calibration()).invoke("?")) == decided
    stricter = found(make(server, policy=Policy(answer=0.8, otherwise="human")).invoke("?"))
    assert (stricter["decision"], stricter["calibration"]) == ("human", "servers@1234")


@pytest.mark.filterwarnings("ignore:The function `load` is in beta")
def test_a_serialised_model_is_the_same_one(server, tmp_path, monkeypatch):
    model = chat(
        server,
        uncertainty={"trace": True},
        policy=POLICY,
        calibration=Path(saved(tmp_path)),
        temperature=0,
        on_failure="closed",
    )
    assert found(model.invoke("?"))["calibration"] == "uncalibrated"
    data = json.loads(json.dumps(dumpd(model)))
    assert data["id"] == ["langchain_gnuq", "chat_models", "ChatGnuq"]
    # OpenAI's key does not become that of another server.
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    monkeypatch.setenv("GNUQ_API_KEY", "ours")
    again = load(data, valid_namespaces=["langchain_gnuq"], allowed_objects=[ChatGnuq], secrets_from_env=True)
    assert isinstance(again, ChatGnuq)
    assert again.root_client.api_key == "ours"
    assert (again.policy, again.uncertainty, again.on_failure) == (POLICY, {"trace": True}, "closed")
    assert found(again.invoke("?")) == found(model.invoke("?"))


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere/v1")
    monkeypatch.setenv("OPENAI_API_BASE", "http://elsewhere/v1")
    model = ChatGnuq(model="small")
    assert model.openai_api_base == "http://127.0.0.1:8000/v1"
    assert str(model.root_client.base_url) == "http://127.0.0.1:8000/v1/"
    assert model.root_client.api_key == "EMPTY"
    monkeypatch.setenv("GNUQ_BASE_URL", "http://here/v1")
    assert ChatGnuq(model="small").openai_api_base == "http://here/v1"


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValidationError, match="unknown key 'answr'; did you mean 'answer'"):
        ChatGnuq(model="small", policy={"answr": 0.8})
    with pytest.raises(ValidationError, match="max_remembered"):
        ChatGnuq(model="small", max_remembered=0)
    with pytest.raises(ValidationError, match="on_failure"):
        ChatGnuq(model="small", on_failure="shut")
    with pytest.raises(ValidationError, match=r"missing\.json: No such file"):
        ChatGnuq(model="small", calibration=tmp_path / "missing.json")
    with pytest.raises(ValidationError, match="path of its file, is expected, not float"):
        ChatGnuq(model="small", calibration=0.1)


def test_a_trace_names_this_package(server):
    model = chat(server)
    assert model._get_ls_params()["ls_provider"] == "gnuq"
    assert model.metadata is not None
    assert model.metadata["lc_versions"]["langchain-gnuq"] == __version__


def test_models_whose_name_openai_knows_still_use_the_route_that_is_scored(server):
    assert found(chat(server, model="gpt-5-pro").invoke("?"))["status"] == "scored"
    assert isinstance(chat(server, model="o1").invoke("?"), AIMessage)
