"""What the service knows of the server that it works for."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import msgspec

from gnuq_serve.service.answer import ThinkingLength
from gnuq_serve.service.requests.request_plan import AdapterPath, nowhere
from gnuq_serve.service.scorer.engine_load import EngineLoad
from gnuq_serve.service.scorer.messages import ScorerConfig
from gnuq_serve.service.settings.model import Settings


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine has loaded; the scorer loads the same."""

    model: str
    dtype: str
    revision: str | None = None
    trust_remote_code: bool = False
    config_overrides: dict[str, Any] = {}
    quantization: str | None = None  # vLLM's name of the method; None: plain weights
    workers: int = 1  # over which the weights are split
    shared: str | None = None  # the engine's weights, for a scorer to read: a ``SharedWeights`` in JSON
    shared_refused: str | None = None  # why not
    raw_logprobs: bool = True
    end_of_turn_ids: tuple[int, ...] = ()  # the tokenizer's own first

    def or_instead(self, model: str | None) -> ServedModel:
        """What the scorer loads: the same, or another checkpoint without this one's revision and overrides."""
        if model is None or model == self.model:
            return self
        return msgspec.structs.replace(self, model=model, revision=None, config_overrides={})

    @property
    def approximate_weights(self) -> str | None:
        """The warning on every score, where the scorer's weights can't be the engine's; None: they can."""
        if self.quantization is None:
            return None
        return (
            f"approximate_weights: the engine's are quantised ({self.quantization}), the score is of plain ones"
        )


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """What the service knows of the server that it works in; looked up at the time of each request.

    Attributes:
        name: what tells this server from others of the machine; the same in all its processes.
        adapters: names of the LoRA adapters that it knows.
        adapter_path: where one of them is, for the scorer to load.
        parses: whether it takes answers apart with a tool or reasoning parser; None: not known.
        sampling_defaults: how it draws answers where a request does not say; None: not known.
        thinking_length: finds the end of the thinking in an answer; None: there is no reasoning parser.
        engine_load: requests that wait in the engine; None: unknown, and the scorer can't yield to it.
    """

    name: str = "default"
    adapters: Callable[[], Container[str]] = tuple
    adapter_path: AdapterPath = nowhere
    parses: Callable[[], bool | None] = lambda: True
    sampling_defaults: Callable[[], Mapping[str, Any] | None] = lambda: None
    thinking_length: ThinkingLength | None = None
    engine_load: EngineLoad | None = None


def scorer_config(settings: Settings, served: ServedModel) -> ScorerConfig:
    """What the scorer process is told: the engine's model, or the operator's in its place."""
    scored = served.or_instead(settings.scorer_model)
    unasked = settings.scorer_weights != "shared" or served.shared is not None
    unshared = None if unasked else "only vLLM's own server, with our plugin in it, can share them"
    return ScorerConfig(
        model=scored.model,
        served_model=served.model,
        dtype=served.dtype if settings.scorer_dtype == "auto" else settings.scorer_dtype,
        weights=settings.scorer_weights,
        shared=served.shared,
        shared_refused=served.shared_refused or unshared,
        engine_workers=served.workers,
        device=settings.scorer_device,
        device_map=settings.scorer_device_map,
        threads=settings.scorer_threads,
        mode=settings.mode,
        max_batch_tokens=settings.max_batch_tokens,
        memory_budget=settings.memory_budget,
        revision=scored.revision,
        trust_remote_code=scored.trust_remote_code,
        config_overrides=scored.config_overrides,
        gpu_memory_fraction=settings.scorer_gpu_memory_fraction,
        max_adapters=settings.scorer_adapters,
        max_queue=settings.max_queue,
        on_overload=settings.on_overload,
    )
