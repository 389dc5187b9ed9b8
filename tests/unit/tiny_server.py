"""The routes of `gnuq-serve serve` that an evaluation asks, over real HTTP, with a tiny random model behind them.

Texts are token ids byte by byte; a chat is its last message between two marks. Greedy and sampled answers,
log-probabilities and uncertainties are the model's own.
"""

import threading

import torch
from json_server import JsonServer

from gnuq_serve.scorer import Sample, Scorer

BEGIN, END = 1, 2
VOCABULARY = 300


def encode(text):
    return [3 + byte for byte in text.encode()]


def decode(ids):
    return bytes(one - 3 for one in ids if 3 <= one < 259).decode(errors="replace")


class TinyServer(JsonServer):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.scorer = Scorer.from_model(model)
        self.requests = []
        self.fail_after = None  # so many requests are answered, all others with 401
        self._lock = threading.Lock()

    def get(self):
        return 200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]}

    def post(self, path, request):
        with self._lock:
            self.requests.append((path, request))
            if self.fail_after is not None and len(self.requests) > self.fail_after:
                return 401, {"error": {"message": "gone"}}
            return 200, self.answer(path, request)

    def answer(self, path, request):
        if path == "/tokenize":
            return {"tokens": self.tokens(request)}
        if path == "/v1/uncertainty":
            options = {name: value for name, value in request["uncertainty"].items() if name != "wait"}
            sample = Sample(request["prompt_token_ids"], request["answer_token_ids"])
            return self.scorer.score([sample], **options)[0].to_dict()
        assert path == "/v1/completions"
        assert request["uncertainty"] is False
        return {"choices": self.choices(request)}

    def tokens(self, request):
        if "prompt" in request:
            return encode(request["prompt"])
        *_, last = request["messages"]
        if last["role"] == "assistant":
            asked = self.tokens({"messages": request["messages"][:-1]})
            return [*asked, *encode(last["content"]), END, *encode("\n")]
        return [BEGIN, *encode(last["content"]), END]

    @torch.inference_mode()
    def choices(self, request):
        prompt, generator = request["prompt"], torch.Generator().manual_seed(request.get("seed", 0))
        logs = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        if "prompt_logprobs" in request:
            entries = [{str(one): {"logprob": logs[at, one].item()}} for at, one in enumerate(prompt[1:])]
            return [{"text": "", "finish_reason": "length", "prompt_logprobs": [None, *entries]}]
        if "logprob_token_ids" in request:
            found = {f"token_id:{one}": logs[-1, one].item() for one in request["logprob_token_ids"]}
            return [{"text": "", "finish_reason": "length", "logprobs": {"top_logprobs": [found]}}]
        return [self.generated(request, generator) for _ in range(request["n"])]

    def generated(self, request, generator):
        ids, start = list(request["prompt"]), len(request["prompt"])
        while (len(ids) - start < request["max_tokens"] and ids[-1] != END) or len(ids) == start:
            logits = self.model(torch.tensor([ids])).logits[0, -1]
            if request["temperature"] > 0:
                weights = (logits / request["temperature"]).softmax(-1)
                ids.append(torch.multinomial(weights, 1, generator=generator).item())
            else:
                ids.append(logits.argmax().item())
        answer = ids[start:]
        stopped = answer[-1] == END
        return {
            "text": decode(answer),
            "token_ids": answer,
            "finish_reason": "stop" if stopped else "length",
        }
