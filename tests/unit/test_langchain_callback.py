"""The LangChain handler: stock clients against a real HTTP server that answers as gnuq-serve does."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gnuq_serve.policy import Policy
from gnuq_serve.uncertainty import Uncertainty

pytest.importorskip("langchain_openai")
pytest.importorskip("langchain_gnuq")

from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_gnuq import UncertaintyCallbackHandler, UnscoredAnswerError
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

POLICY = Policy(signal="normalized.probability", answer=0.8, escalate=0.6, otherwise="human")
# A scored object for each index of a request with n > 1: sure, middling, unsure.
SCORED = [
    Uncertainty.scored(
        token_log_probabilities=[mean, mean], token_entropies=[0.1, 0.2], grad_norm_sq=90.0
    ).to_dict()
    for mean in (-0.01, -0.4, -2.0)
]
ABSENT = object()


class Server(ThreadingHTTPServer):
    """Answers ``content`` with ``objects[i]`` mirrored in the logprobs of choice i."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.objects: list[Any] = SCORED
        self.content = "Paris"
        self.requests: list[dict[str, Any]] = []


class Answer(BaseHTTPRequestHandler):
    # HTTP/1.0 closes each connection: langchain-openai shares clients by address, across event loops.
    protocol_version = "HTTP/1.0"
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        if request.get("stream"):
            return self.send("text/event-stream", self.stream().encode())
        chat = self.path.endswith("/chat/completions")
        choices = []
        for index in range(request.get("n") or 1):
            choice: dict[str, Any] = {"index": index, "finish_reason": "stop", "logprobs": None}
            if self.server.objects[index] is not ABSENT:
                mirrored = {"content": None} if chat else {}
                choice["logprobs"] = {**mirrored, "uncertainty": self.server.objects[index]}
                choice["uncertainty"] = self.server.objects[index]
            text = self.server.content
            choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choices.append(choice)
        body = {
            "id": "chatcmpl-1",
            "object": "chat.completion" if chat else "text_completion",
            "created": 1,
            "model": "small",
            "choices": choices,
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        }
        return self.send("application/json", json.dumps(body).encode())

    def stream(self) -> str:
        frame = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "small"}
        deltas = [({"role": "assistant", "content": "Paris"}, None), ({}, "stop")]
        chunks = [
            frame | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
            for delta, reason in deltas
        ]
        return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"

    def send(self, content_type: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def settings(server: Server) -> dict[str, Any]:
    base_url = f"http://127.0.0.1:{server.server_port}/v1"
    return {"base_url": base_url, "api_key": "EMPTY", "model": "small", "max_retries": 0}


def chat(server: Server, *handlers: UncertaintyCallbackHandler, **changes: Any) -> ChatOpenAI:
    return ChatOpenAI(**settings(server) | changes, callbacks=list(handlers))


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

    server.content = '{"name": "Paris"}'
    model = chat(server, UncertaintyCallbackHandler(POLICY))
    answer = model.with_structured_output(City, include_raw=True, method=method).invoke("?")
    assert found(answer["raw"])["decision"] == "answer"
    if method != "function_calling":
        assert answer["parsed"] == City(name="Paris")


def test_text_completions_have_it_in_the_generation_info(server):
    model = OpenAI(**settings(server), callbacks=[UncertaintyCallbackHandler(POLICY)])
    (generation,) = model.generate(["The capital of France is"]).generations[0]
    assert generation.generation_info["uncertainty"]["decision"] == "answer"
    server.objects = [ABSENT]
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
    server.objects = [ABSENT]
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
    server.objects = [ABSENT]
    handler = UncertaintyCallbackHandler(POLICY)
    message = chat(server, handler).invoke("?")
    assert message.text == "Paris"
    assert found(message)["status"] == "skipped"
    assert "not a gnuq-serve server" in found(message)["reason"]
    assert found(message)["decision"] is None
    assert found(asyncio.run(chat(server, handler).ainvoke("?")))["status"] == "skipped"


def test_real_logprobs_without_uncertainty_are_unscored():
    message = AIMessage("Paris", response_metadata={"logprobs": {"content": []}})
    result = LLMResult(generations=[[ChatGeneration(message=message)]])
    UncertaintyCallbackHandler().on_llm_end(result, run_id=uuid.uuid4())
    assert found(message)["status"] == "skipped"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("status", ["failed", "skipped", "pending"])
def test_closed_names_the_servers_reason(server, status, asynchronous):
    server.objects = [Uncertainty(status=status, reason="the queue is full").to_dict()]
    model = chat(server, UncertaintyCallbackHandler(POLICY, on_failure="closed"))
    with pytest.raises(UnscoredAnswerError, match=rf"{status} \(the queue is full\)") as error:
        asyncio.run(model.ainvoke("?")) if asynchronous else model.invoke("?")
    assert error.value.uncertainty.status == status


def test_closed_looks_at_every_choice(server):
    server.objects = [SCORED[0], Uncertainty.failed("out of memory").to_dict()]
    model = chat(server, UncertaintyCallbackHandler(on_failure="closed"), n=2)
    with pytest.raises(UnscoredAnswerError, match="out of memory"):
        model.generate([[HumanMessage("?")]])
    server.objects = SCORED
    assert len(model.generate([[HumanMessage("?")]]).generations[0]) == 2


def test_a_stream_is_remembered_as_skipped_and_fails_at_its_end_when_closed(server):
    handler = UncertaintyCallbackHandler(POLICY)
    chunks = list(chat(server, handler).stream("?"))
    assert "".join(chunk.text for chunk in chunks) == "Paris"
    remembered = handler.uncertainty_of(run_id_of(chunks[0]))
    assert remembered is not None
    assert remembered.status == "skipped"
    with pytest.raises(UnscoredAnswerError):
        list(chat(server, UncertaintyCallbackHandler(on_failure="closed")).stream("?"))


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
    server.objects = [data]
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
