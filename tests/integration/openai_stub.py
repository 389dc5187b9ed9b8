"""A small OpenAI-compatible server in a thread: scripted answers over real HTTP, every request on record."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from gnuq_serve import Uncertainty


def score(seed, fingerprint="f1f1"):
    """A score that follows from the seed."""
    return Uncertainty.scored(
        token_log_probabilities=[-0.05 * (1 + seed % 23)] * (2 + seed % 3),
        token_entropies=[0.1 * (1 + seed % 11)] * (2 + seed % 3),
        grad_norm_sq=1000.0 + 37 * (seed % 41),
        fingerprint=fingerprint,
    ).to_dict()


class OpenAIStub:
    """``reply(request) -> dict`` with any of: text, uncertainty, finish_reason, status, error."""

    def __init__(self, reply, *, models=("tiny",), delay=0.0):
        self.reply, self.models, self.delay = reply, models, delay
        self.requests = []
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.send(
                    200, {"object": "list", "data": [{"id": name, "object": "model"} for name in stub.models]}
                )

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub._lock:
                    stub.requests.append((self.path, request))
                time.sleep(stub.delay)
                answer = stub.reply(request)
                if "status" in answer:
                    self.send(answer["status"], answer.get("body") or {"error": {"message": answer["error"]}})
                    return
                choice = {
                    "index": 0,
                    "message": {"role": "assistant", "content": answer.get("text")},
                    "finish_reason": answer.get("finish_reason", "stop"),
                }
                if "uncertainty" in answer:
                    choice["uncertainty"] = answer["uncertainty"]
                usage = {"prompt_tokens": 17, "completion_tokens": 3, "total_tokens": 20}
                body = {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"]}
                self.send(200, {**body, "choices": [choice], "usage": usage})

            def send(self, status, body):
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):  # a client that was killed
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def asked(self):
        """The last user message of every request for a completion, in order of arrival."""
        return [request["messages"][-1]["content"] for path, request in self.requests if "completions" in path]
