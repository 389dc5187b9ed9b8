"""A small OpenAI-compatible server in a thread: scripted answers over real HTTP, every request on record."""

import threading
import time

from json_server import JsonServer

from gnuq_serve import Uncertainty


def score(seed, fingerprint="f1f1"):
    """A score that follows from the seed."""
    return Uncertainty.scored(
        token_log_probabilities=[-0.05 * (1 + seed % 23)] * (2 + seed % 3),
        token_entropies=[0.1 * (1 + seed % 11)] * (2 + seed % 3),
        grad_norm_sq=1000.0 + 37 * (seed % 41),
        fingerprint=fingerprint,
    ).to_dict()


class OpenAIStub(JsonServer):
    """``reply(request) -> dict`` with any of: text, uncertainty, finish_reason, status, error."""

    def __init__(self, reply, *, models=("tiny",), delay=0.0):
        super().__init__()
        self.reply, self.models, self.delay = reply, models, delay
        self.requests = []
        self._lock = threading.Lock()

    def get(self):
        return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}

    def post(self, path, request):
        with self._lock:
            self.requests.append((path, request))
        time.sleep(self.delay)
        answer = self.reply(request)
        if "status" in answer:
            return answer["status"], answer.get("body") or {"error": {"message": answer["error"]}}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.get("text")},
            "finish_reason": answer.get("finish_reason", "stop"),
        }
        if "uncertainty" in answer:
            choice["uncertainty"] = answer["uncertainty"]
        usage = {"prompt_tokens": 17, "completion_tokens": 3, "total_tokens": 20}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"]}
        return 200, {**body, "choices": [choice], "usage": usage}

    def asked(self):
        """The last user message of every request for a completion, in order of arrival."""
        return [request["messages"][-1]["content"] for path, request in self.requests if "completions" in path]
