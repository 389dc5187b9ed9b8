"""The LangChain handler: stock clients against a real HTTP server that answers as gnuq-serve does."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.runnables import RunnableLambda, RunnableParallel
from langchain_gnuq import UncertaintyCallbackHandler, UnscoredAnswerError
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel
from scripted_openai import Reply, ScriptedServer, running, scored

from gnuq_serve.policy import Policy
from gnuq_serve.uncertainty import Uncertainty

POLICY = Policy(signal="normalized.probability", answer=0.8, escalate=0.6, otherwise="human")
# A scored object for each index of a request with n > 1: sure, middling, unsure.
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


def chat(server: ScriptedServer, *handlers: UncertaintyCallbackHandler, **changes: Any) -> ChatOpenAI:
    return ChatOpenAI(**server.settings(**changes), callbacks=list(handlers))


def found(message: Any) -> dict[str, Any]:
    return message.response_metadata["uncertainty"]


def run_id_of(message: AIMessage) -> uuid.UUID:
    assert message.id is not None
    return uuid.UUID(message.id.removeprefix("lc_run--")[:36])


def test_invoke_writes_the_servers_numbers_and_the_decision(server):
    handler = UncertaintyCallbackHandler(POLICY)
    message = chat(server, handler).invoke("capital of France?")
    assert found(message) == SCORED[0] | {"decision": "answer", "calibration": "uncalibrated"}
    assert message.text == "Paris"
    # What the server sent is left as it was.
    assert message.response_metadata["logprobs"]["uncertainty"] == SCORED[0]
    assert handler.uncertainty_of(run_id_of(message)) == Uncertainty.from_dict(found(message))
    assert handler.uncertainty_of(uuid.uuid4()) is None


def test_without_a_policy_nothing_is_decided(server):
    assert found(chat(server, UncertaintyCallbackHandler()).invoke("?")) == SCORED[0]


def test_a_policy_without_its_signal_passes_undecided(server):
    handler = UncertaintyCallbackHandler(Policy(answer=0.8), on_failure="closed")
    assert found(chat(server, handler).invoke("?")) == SCORED[0]


def test_ainvoke(server):
    message = asyncio.run(chat(server, UncertaintyCallbackHandler(POLICY)).ainvoke("?"))
    assert found(message)["decision"] == "answer"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_batch(server, asynchronous):
    handler = UncertaintyCallbackHandler(POLICY)
    model = chat(server, handler)
    questions = [f"question {i}" for i in range(8)]
    messages = asyncio.run(model.abatch(questions)) if asynchronous else model.batch(questions)
    assert len(messages) == len({run_id_of(message) for message in messages}) == 8
    for message in messages:
        assert found(message)["decision"] == "answer"
        assert handler.uncertainty_of(run_id_of(message)) is not None


def test_generate_decides_each_choice_of_each_prompt(server):
    handler = UncertaintyCallbackHandler(POLICY)
    result = chat(server, handler, n=3).generate([[HumanMessage("a")], [HumanMessage("b")]])
    for prompt, run in zip(result.generations, result.run or [], strict=True):
        metadata = [found(generation.message) for generation in prompt]
        assert [u["decision"] for u in metadata] == ["answer", "escalate", "human"]
        assert [u["log_probability"] for u in metadata] == [u["log_probability"] for u in SCORED]
        remembered = handler.uncertainty_of(run.run_id)
        assert remembered is not None
        assert remembered.decision == "answer"


@pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
def test_structured_output_with_raw(server, method):
    class City(BaseModel):
        name: str

    server.reply = Reply('{"name": "Paris"}')
    model = chat(server, UncertaintyCallbackHandler(POLICY))
    answer = model.with_structured_output(City, include_raw=True, method=method).invoke("?")
    assert found(answer["raw"])["decision"] == "answer"
    if method != "function_calling":
        assert answer["parsed"] == City(name="Paris")


def test_text_completions_have_it_in_the_generation_info(server):
    model = OpenAI(**server.settings(), callbacks=[UncertaintyCallbackHandler(POLICY)])
    (generation,) = model.generate(["The capital of France is"]).generations[0]
    assert generation.generation_info["uncertainty"]["decision"] == "answer"
    server.reply = Reply(uncertainty=None)
    (generation,) = model.generate(["The capital of France is"]).generations[0]
    assert generation.generation_info["uncertainty"]["status"] == "skipped"


def test_two_handlers_agree_and_the_second_may_decide(server):
    message = chat(server, *(UncertaintyCallbackHandler(POLICY) for _ in range(2))).invoke("?")
    assert found(message) == SCORED[0] | {"decision": "answer", "calibration": "uncalibrated"}
    first, second = UncertaintyCallbackHandler(POLICY), UncertaintyCallbackHandler()
    assert found(chat(server, first, second).invoke("?")) == found(message)
    assert found(chat(server, second, first).invoke("?")) == found(message)


def test_a_cache_hit_has_the_same_object(server):
    handler = UncertaintyCallbackHandler(POLICY)
    model = chat(server, handler, cache=InMemoryCache())
    first, second = model.invoke("?"), model.invoke("?")
    assert len(server.requests) == 1
    assert found(first) == found(second)
    assert found(second)["decision"] == "answer"


@pytest.mark.parametrize("cached", [False, True])
def test_an_unscored_answer_raises_when_closed_also_from_the_cache(server, cached):
    server.reply = Reply(uncertainty=None)
    model = chat(
        server, UncertaintyCallbackHandler(on_failure="closed"), cache=InMemoryCache() if cached else False
    )
    for _ in range(2):
        with pytest.raises(UnscoredAnswerError, match=r"not a gnuq-serve server.*on_failure=\"open\""):
            model.invoke("?")
    assert len(server.requests) == (1 if cached else 2)
    with pytest.raises(UnscoredAnswerError):
        asyncio.run(model.ainvoke("?"))


def test_an_unscored_answer_passes_when_open(server):
    server.reply = Reply(uncertainty=None)
    handler = UncertaintyCallbackHandler(POLICY)
    message = chat(server, handler).invoke("?")
    assert message.text == "Paris"
    assert found(message)["status"] == "skipped"
    assert "not a gnuq-serve server" in found(message)["reason"]
    assert found(message)["decision"] is None
    assert found(asyncio.run(chat(server, handler).ainvoke("?")))["status"] == "skipped"


@pytest.mark.parametrize("logprobs", [{"content": []}, [], None, "none"], ids=str)
def test_real_logprobs_without_uncertainty_are_unscored(logprobs):
    message = AIMessage("Paris", response_metadata={"logprobs": logprobs})
    result = LLMResult(generations=[[ChatGeneration(message=message)]])
    UncertaintyCallbackHandler().on_llm_end(result, run_id=uuid.uuid4())
    assert found(message)["status"] == "skipped"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("status", ["failed", "skipped", "pending"])
def test_closed_names_the_servers_reason(server, status, asynchronous):
    server.reply = Reply(uncertainty=Uncertainty(status=status, reason="the queue is full").to_dict())
    model = chat(server, UncertaintyCallbackHandler(POLICY, on_failure="closed"))
    with pytest.raises(UnscoredAnswerError, match=rf"{status} \(the queue is full\)") as error:
        asyncio.run(model.ainvoke("?")) if asynchronous else model.invoke("?")
    assert error.value.uncertainty.status == status


def test_closed_looks_at_every_choice(server):
    server.reply = [Reply(), Reply(uncertainty=Uncertainty.failed("out of memory").to_dict())]
    model = chat(server, UncertaintyCallbackHandler(on_failure="closed"), n=2)
    with pytest.raises(UnscoredAnswerError, match="out of memory"):
        model.generate([[HumanMessage("?")]])
    server.reply = Reply()
    assert len(model.generate([[HumanMessage("?")]]).generations[0]) == 2


def carriers(chunks: list[Any]) -> list[bool]:
    return ["uncertainty" in chunk.response_metadata for chunk in chunks]


@pytest.mark.parametrize("more", [{}, {"stream_usage": True}, {"logprobs": True}], ids=str)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_has_it_on_its_last_chunk_and_no_other(server, asynchronous, more):
    handler = UncertaintyCallbackHandler(POLICY)
    model = chat(server, handler, **more)

    async def collect() -> list[Any]:
        return [chunk async for chunk in model.astream("?")]

    chunks = asyncio.run(collect()) if asynchronous else list(model.stream("?"))
    assert carriers(chunks) == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].chunk_position == "last"
    total = sum(chunks[1:], start=chunks[0])
    assert total.text == "Paris"
    assert found(total) == SCORED[0] | {"decision": "answer", "calibration": "uncalibrated"}
    assert handler.uncertainty_of(run_id_of(chunks[0])) == Uncertainty.from_dict(found(total))


class Counting(UncertaintyCallbackHandler):
    """Counts how often an answer is decided on."""

    def __init__(self) -> None:
        super().__init__(POLICY)
        self.decided = 0
        decider = self._decider

        class Decider:
            def annotate(_, *args: Any) -> Uncertainty:  # noqa: N805
                self.decided += 1
                return decider.annotate(*args)

        self._decider = Decider()  # type: ignore[assignment]


@pytest.mark.parametrize("ask", ["invoke", "stream", "streaming_invoke"])
def test_an_answer_is_decided_on_once(server, ask):
    handler = Counting()
    model = chat(server, handler, streaming=ask == "streaming_invoke")
    list(model.stream("?")) if ask == "stream" else model.invoke("?")
    assert handler.decided == 1
    assert len(server.requests) == 1


def test_an_unscored_stream_says_so_and_fails_at_its_end_when_closed(server):
    server.reply = Reply(uncertainty=None)
    handler = UncertaintyCallbackHandler(POLICY)
    chunks = list(chat(server, handler).stream("?"))
    assert found(chunks[-1])["status"] == "skipped"
    remembered = handler.uncertainty_of(run_id_of(chunks[0]))
    assert remembered is not None
    assert remembered.status == "skipped"
    seen: list[Any] = []
    with pytest.raises(UnscoredAnswerError):
        seen.extend(chat(server, UncertaintyCallbackHandler(on_failure="closed")).stream("?"))
    assert "".join(chunk.text for chunk in seen) == "Paris"


def test_streams_that_are_left_early_do_not_pile_up(server):
    handler = UncertaintyCallbackHandler(max_remembered=3)
    model = chat(server, handler)
    for _ in range(5):
        next(iter(model.stream("?")))
    assert len(handler._open) <= 3
    list(model.stream("?"))
    assert len(handler._open) <= 3


def test_an_error_of_the_server_is_the_users_and_leaves_nothing_behind(server):
    server.reply = Reply(status=500)
    handler = UncertaintyCallbackHandler()
    for ask in (chat(server, handler).invoke, lambda text: list(chat(server, handler).stream(text))):
        with pytest.raises(Exception, match="500"):
            ask("?")
    assert not handler._open


def test_an_unscored_answer_falls_back(server):
    server.reply = [Reply(uncertainty=None), Reply("London")]
    first = chat(server, UncertaintyCallbackHandler(on_failure="closed"))
    second = chat(server, UncertaintyCallbackHandler(POLICY))
    model = first.with_fallbacks([second], exceptions_to_handle=(UnscoredAnswerError,))
    message = model.invoke("?")
    assert message.text == "London"
    assert found(message)["decision"] == "answer"
    server.reply = Reply(status=500)
    with pytest.raises(Exception, match="500"):
        model.invoke("?")


def test_an_unscored_answer_is_asked_again_by_with_retry(server):
    server.reply = [Reply(uncertainty=None), Reply("London")]
    model = chat(server, UncertaintyCallbackHandler(on_failure="closed"))
    again = model.with_retry(retry_if_exception_type=(UnscoredAnswerError,), wait_exponential_jitter=False)
    assert again.invoke("?").text == "London"


def test_a_chain_is_known_by_the_run_id_that_it_was_given(server):
    handler = UncertaintyCallbackHandler(POLICY)
    outer = uuid.uuid4()
    inner = chat(server) | RunnableLambda(lambda message: message.text)
    chain = RunnableParallel(a=inner) | RunnableLambda(lambda both: both["a"])
    assert chain.invoke("?", {"run_id": outer, "callbacks": [handler]}) == "Paris"
    remembered = handler.uncertainty_of(str(outer))
    assert remembered is not None
    assert remembered.decision == "answer"
    # Nothing of the chain's inner workings is kept.
    assert not handler._remembered._parents
    with pytest.raises(ValueError, match="badly formed"):
        handler.uncertainty_of("no run id")


def test_another_handler_that_breaks_does_not_cost_the_score(server):
    class Broken(BaseCallbackHandler):
        def on_llm_new_token(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("broken")

        on_llm_end = on_llm_new_token  # type: ignore[assignment]

    model = ChatOpenAI(**server.settings(), callbacks=[Broken(), UncertaintyCallbackHandler(), Broken()])
    assert found(model.invoke("?")) == SCORED[0]
    assert found(list(model.stream("?"))[-1]) == SCORED[0]


def test_fields_of_a_newer_server_stay(server):
    newer = SCORED[0] | {"thinking": {"tokens": 3}, "signals": SCORED[0]["signals"]}
    server.reply = Reply(uncertainty=newer)
    assert found(chat(server, UncertaintyCallbackHandler(POLICY)).invoke("?"))["thinking"] == {"tokens": 3}


MALFORMED = [
    {},
    {"status": "done"},
    {"status": ["scored"]},
    "scored",
    7,
    [SCORED[0]],
    SCORED[0] | {"normalized": [1, 2]},
    SCORED[0] | {"normalized": {"probability": "high"}},
    SCORED[0] | {"normalized": {"probability": 10**400}},
    SCORED[0] | {"warnings": 5},
]


@pytest.mark.parametrize("data", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_object_is_a_failure_with_a_reason(server, data):
    server.reply = Reply(uncertainty=data)
    message = chat(server, UncertaintyCallbackHandler(POLICY)).invoke("?")
    assert message.text == "Paris"
    assert found(message)["status"] == "failed"
    assert found(message)["reason"].startswith("the uncertainty object is malformed: ")
    assert len(found(message)["reason"]) < 250
    with pytest.raises(UnscoredAnswerError, match="malformed"):
        chat(server, UncertaintyCallbackHandler(POLICY, on_failure="closed")).invoke("?")


def test_the_registry_is_bounded():
    handler = UncertaintyCallbackHandler(max_remembered=3)
    runs = [uuid.uuid4() for _ in range(5)]
    for run in runs:
        generation = ChatGeneration(message=AIMessage("Paris"))
        handler.on_llm_end(LLMResult(generations=[[generation]]), run_id=run)
    assert [handler.uncertainty_of(run) is None for run in runs] == [True, True, False, False, False]


def test_a_run_without_generations_is_no_error():
    run = uuid.uuid4()
    handler = UncertaintyCallbackHandler(on_failure="closed")
    handler.on_llm_end(LLMResult(generations=[[]]), run_id=run)
    assert handler.uncertainty_of(run) is None


def test_wrong_arguments():
    with pytest.raises(ValueError, match="on_failure='shut' is unknown; choose 'open' or 'closed'"):
        UncertaintyCallbackHandler(on_failure="shut")
    with pytest.raises(ValueError, match="max_remembered=0 must be at least 1"):
        UncertaintyCallbackHandler(max_remembered=0)
