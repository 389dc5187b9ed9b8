"""The middleware's surroundings: a service whose scores are given, vLLM's response, a connection's scope."""

import asyncio

from prometheus_client import REGISTRY

from gnuq_serve.service.seeing.observation import Observers
from gnuq_serve.service.served import Server
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings.model import load_settings
from gnuq_serve.uncertainty import Uncertainty

CHAT = "/v1/chat/completions"
REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Grüße"}]}
SCORED = Uncertainty(status="scored", id="unc-1", tokens=2, log_probability=-0.75)


class StandInService(UncertaintyService):
    """A service whose scores are given."""

    def __init__(self, uncertainties=(SCORED,), error=None, mirror=False, adapters=()):
        super().__init__(load_settings().model_copy(update={"mirror_in_logprobs": mirror}))
        self.server = Server(adapters=lambda: adapters)
        self.uncertainties, self.error = [one.to_dict() for one in uncertainties], error
        self.asked, self.kept, self.given_up = [], [], 0
        self.observers, self.told, self.contexts = Observers(), [], []
        self.observers.append(self.told.append)
        self.ready = None  # an event to wait for
        self.was_asked = asyncio.Event()

    def _keep_soon(self, results):
        self.kept += results

    async def score(self, answers, options, context):
        self.asked.append(answers)
        self.contexts.append(context)
        self.was_asked.set()
        try:
            await (asyncio.sleep(0) if self.ready is None else self.ready.wait())
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if self.error is not None:
            raise self.error
        return self.uncertainties[: len(answers)]


def vllm_response():
    return {
        "id": "chatcmpl-1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Grüße, 世界 \U0001f600", "tool_calls": []},
                "logprobs": {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -0.25}]},
                "token_ids": [7, 2],
            }
        ],
        "prompt_token_ids": [1, 5, 6],
    }


def scope(path=CHAT, headers=()):
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), *headers],
    }


def count(name, **labels):
    return REGISTRY.get_sample_value(name, labels) or 0
