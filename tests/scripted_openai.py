"""A scripted OpenAI-compatible server in a thread that answers, and streams, as gnuq-serve does; real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gnuq_serve.uncertainty import Uncertainty

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def scored(mean: float = -0.01, **changes: Any) -> dict[str, Any]:
    """A scored object with ``normalized.probability`` ``exp(mean)``: 0.99, 0.67, 0.14 for -0.01, -0.4, -2."""
    uncertainty = Uncertainty.scored(
        token_log_probabilities=[mean, mean], token_entropies=[0.1, 0.2], grad_norm_sq=90.0
    )
    return uncertainty.replace(**changes).to_dict()


@dataclass
class Reply:
    """One answer.

    Attributes:
        text: its content; a stream sends it word by word.
        tool_calls: pairs of a function's name and its arguments.
        uncertainty: the object of the answer; None: the response carries none, as plain vLLM's.
        status: of the response; anything but 200 is an error.
        fields: more fields of the choice, such as ``finish_reason``.
    """

    text: str = "Paris"
    tool_calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    uncertainty: Any = field(default_factory=scored)
    status: int = 200
    fields: dict[str, Any] = field(default_factory=dict)


class ScriptedServer(ThreadingHTTPServer):
    """Asks ``reply`` what to answer; ``requests`` has every request's body.

    ``reply`` is a function of the request and the choice's index, the replies in their order (the last one is
    given again and again), or one for all. A request for ``n`` choices gets one reply for each.
    """

    daemon_threads = True

    def __init__(
        self, reply: Callable[[dict[str, Any], int], Reply] | list[Reply] | Reply, mirror: bool = True
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.mirror = mirror
        self.requests: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Arguments of a chat model that asks this server."""
        return {"base_url": self.base_url, "api_key": "EMPTY", "model": "small", "max_retries": 0} | changes

    def next_reply(self, request: dict[str, Any], index: int) -> Reply:
        with self._lock:
            if isinstance(self.reply, list):
                return self.reply.pop(0) if len(self.reply) > 1 else self.reply[0]
        return self.reply(request, index) if callable(self.reply) else self.reply


@contextmanager
def running(reply: Any, mirror: bool = True) -> Iterator[ScriptedServer]:
    """The server while it runs."""
    server = ScriptedServer(reply, mirror)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.0 closes each connection: langchain-openai shares clients by address, across event loops.
    protocol_version = "HTTP/1.0"
    server: ScriptedServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        replies = [self.server.next_reply(request, index) for index in range(request.get("n") or 1)]
        if replies[0].status != 200:
            self.send(replies[0].status, "application/json", json.dumps({"error": {"message": "scripted"}}))
        elif request.get("stream"):
            self.send(200, "text/event-stream", "".join(self.events(request, replies)))
        else:
            self.send(200, "application/json", json.dumps(self.response(request, replies)))

    def response(self, request: dict[str, Any], replies: list[Reply]) -> dict[str, Any]:
        chat = self.path.endswith("/chat/completions")
        choices = []
        for index, reply in enumerate(replies):
            finish = "tool_calls" if reply.tool_calls else "stop"
            choice: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": None}
            choice |= self.scores(reply, {"content": None} if chat else {})
            if chat:
                choice["message"] = {"role": "assistant", "content": reply.text}
                if reply.tool_calls:
                    choice["message"]["tool_calls"] = tool_calls(reply)
            else:
                choice["text"] = reply.text
            choices.append(choice | reply.fields)
        kind = "chat.completion" if chat else "text_completion"
        return {
            "id": "chatcmpl-1",
            "object": kind,
            "created": 1,
            "model": request["model"],
            "choices": choices,
            "usage": USAGE,
        }

    def events(self, request: dict[str, Any], replies: list[Reply]) -> Iterator[str]:
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": request["model"]}
        chat = self.path.endswith("/chat/completions")

        def event(*choices: dict[str, Any], **more: Any) -> str:
            return f"data: {json.dumps({**head, 'choices': choices, **more})}\n\n"

        def piece(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
            said = {"delta": delta} if chat else {"text": delta.get("content") or ""}
            return {"index": index, "finish_reason": None, "logprobs": None, **said, **more}

        for index, reply in enumerate(replies):
            if chat:
                yield event(piece(index, {"role": "assistant", "content": ""}))
            for word in reply.text.split(" ") if reply.text else []:
                yield event(piece(index, {"content": word if word == reply.text.split(" ")[0] else f" {word}"}))
            for place, call in enumerate(tool_calls(reply)):
                yield event(piece(index, {"tool_calls": [{"index": place, **call}]}))
            finish = "tool_calls" if reply.tool_calls else "stop"
            yield event(piece(index, {}, **{"finish_reason": finish} | reply.fields))
        scores = [
            piece(index, {}) | self.scores(reply, {"content": None} if chat else {})
            for index, reply in enumerate(replies)
            if reply.uncertainty is not None
        ]
        if scores:
            yield event(*scores)
        if (request.get("stream_options") or {}).get("include_usage"):
            yield event(usage=USAGE)
        yield "data: [DONE]\n\n"

    def scores(self, reply: Reply, logprobs: dict[str, Any]) -> dict[str, Any]:
        if reply.uncertainty is None:
            return {}
        mirrored = {"logprobs": {**logprobs, "uncertainty": reply.uncertainty}} if self.server.mirror else {}
        return {"uncertainty": reply.uncertainty, **mirrored}

    def send(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def tool_calls(reply: Reply) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{place}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for place, (name, arguments) in enumerate(reply.tool_calls)
    ]
