"""A gated server without vLLM: its answers and their scores are scripted; and what a client can tell of them."""

import asyncio
import gzip
import json

from gnuq_serve import Uncertainty
from gnuq_serve.service.middleware import UncertaintyMiddleware
from gnuq_serve.service.scorer.client import DeadlineError, QueueFullError, ScorerUnavailableError
from gnuq_serve.service.served import ServedModel, Server
from gnuq_serve.service.service import UncertaintyService

TEXT = "Please ask a person."
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SECRET, FIRST_ID = "S3CRET", 987_650  # what an answer is known by: its text and its token ids
LEAK = f"{SECRET}0a"


class ScriptedScorer:
    """In the scorer client's place: the outcome of each answer is told by its first token id."""

    class State:
        dtype = "float32"

    state = State()

    def __init__(self):
        self.outcomes = []

    async def score(self, prompt_ids, answer_ids, deadline_seconds, options, *more):
        outcome = self.outcomes[(answer_ids[0] - FIRST_ID) // 10]
        if outcome == "overload":
            raise QueueFullError("the scoring queue is full")
        if outcome == "late":
            raise DeadlineError("the scorer has not answered within 30 s")
        if outcome == "dead":
            raise ScorerUnavailableError("the scorer process died")
        if outcome == "broken":
            raise KeyError("a bug of ours")
        mean = -3.0 if outcome == "uncertain" else -0.01
        return Uncertainty.scored(
            token_log_probabilities=[mean] * len(answer_ids),
            token_entropies=[0.1] * len(answer_ids),
            grad_norm_sq=90.0,
            mode="answer_only" if outcome == "out of range" else "exact",
        )


def answer_ids(index):
    return [FIRST_ID + 10 * index, FIRST_ID + 10 * index + 1]


def words(index):
    return [f"{SECRET}{index}a", f"{SECRET}{index}b"]


def logprobs(index, chat):
    if chat:
        return {"content": [{"token": word, "logprob": -0.5} for word in words(index)]}
    return {"tokens": words(index), "token_logprobs": [-0.5, -0.5]}


def whole(path, n):
    """vLLM's response with everything that can tell of an answer."""
    choices = []
    for index in range(n):
        text = " ".join(words(index))
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": text}}
        content = {"text": text, "prompt_token_ids": [1, 2], "prompt_logprobs": [None, {"5": text}]}
        if path == CHAT:
            message = {"role": "assistant", "content": text, "reasoning": text, "tool_calls": [call]}
            content = {"message": message}
        choices.append(
            {
                "index": index,
                **content,
                "logprobs": logprobs(index, path == CHAT),
                "token_ids": answer_ids(index),
                "finish_reason": "stop",
                "stop_reason": text,
                "routed_experts": text,
            }
        )
    around = {"prompt_token_ids": [1, 2], "prompt_logprobs": [None], "kv_transfer_params": None}
    return {
        "id": "x-1",
        "object": "o",
        "created": 1,
        "model": "m",
        "choices": choices,
        "usage": {"n": 7},
        **around,
    }


def chunks(path, n, rng):
    """The same as a stream's chunks; the choices take turns at random."""
    queues = []
    for index in range(n):
        queue = [{"delta": {"role": "assistant", "content": ""}}] if path == CHAT else []
        for word, token in zip(words(index), answer_ids(index), strict=True):
            call = {"index": 0, "function": {"arguments": word}}
            content = {"text": word}
            if path == CHAT:
                content = {"delta": {"content": word, "reasoning": word, "tool_calls": [call]}}
            part = {"logprobs": logprobs(index, path == CHAT), "token_ids": [token], "finish_reason": None}
            queue.append({**content, **part})
        queue[-1] |= {"finish_reason": "stop", "stop_reason": words(index)[0]}
        queue[0 if path == COMPLETION else 1]["prompt_token_ids"] = [1, 2]
        queues.append([{"index": index, **choice} for choice in queue])
    made = []
    while waiting := [queue for queue in queues if queue]:
        made.append(
            {"id": "x-1", "object": "o", "created": 1, "model": "m", "choices": [rng.choice(waiting).pop(0)]}
        )
    made[0]["prompt_token_ids"] = [1, 2]
    return made


def event(chunk, end="\n\n"):
    return f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk)}{end}".encode()


class Upstream:
    """An application in vLLM's place, that answers as scripted."""

    def __init__(self):
        self.status, self.media_type, self.parts = 200, "application/json", [b""]
        self.bodies = []

    async def __call__(self, scope, receive, send):
        if scope["type"] == "websocket":
            self.bodies.append(b"")
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.send", "text": LEAK})
            return
        self.bodies.append((await receive())["body"])
        headers = [(b"content-type", self.media_type.encode()), (b"x-request-id", b"r1")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Client:
    """One request after the other to a gated server; what came back."""

    def __init__(self, settings):
        self.service = UncertaintyService(settings)
        self.service.served = ServedModel(model="m", dtype="float32", raw_logprobs=False)
        self.service.server = Server(sampling_defaults=dict)
        self.service._client = self.scorer = ScriptedScorer()
        self.upstream = Upstream()
        self.app = UncertaintyMiddleware(self.upstream, self.service)

    async def ask(self, path, body, method="POST", kind="http"):
        """Status and body of the response; every part that went out before its end is in it."""
        sent = []
        request = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

        async def receive():
            if kind == "websocket":
                return {"type": "websocket.connect"}
            if (message := next(request, None)) is not None:
                return message
            return await asyncio.sleep(3600)

        async def send(message):
            sent.append(message)

        scope = {"type": kind, "path": path, "root_path": "", "headers": []}
        await self.app(scope | ({"method": method} if kind == "http" else {}), receive, send)
        return sent


def received(sent):
    return b"".join(message.get("body", b"") + message.get("text", "").encode() for message in sent)


def documents(body):
    """The JSON of a response, or of each of its events; texts where it is none."""
    parts = [body.decode(errors="replace")]
    if "data:" in parts[0]:
        parts = [line.removeprefix("data:") for line in parts[0].splitlines()]
    for part in parts:
        try:
            yield json.loads(part)
        except ValueError:
            yield part


def told(value):
    """Which answers a JSON value tells of, by their text or their token ids."""
    if isinstance(value, dict):
        return set().union(*map(told, value), *map(told, value.values()))
    if isinstance(value, list):
        return set().union(*map(told, value))
    if isinstance(value, str):
        return {int(piece[0]) for piece in value.split(SECRET)[1:]}
    if isinstance(value, int) and value >= FIRST_ID:
        return {(value - FIRST_ID) // 10}
    return set()


def answers_in(sent):
    body = received(sent)
    if body[:2] == b"\x1f\x8b":
        body = gzip.decompress(body)
    return set().union(*map(told, documents(body)))
