"""vLLM's own loader, watched: it notes where each checkpoint tensor goes, and leaves linear weights readable.

Chosen by ``--load-format gnuq``; importing this registers it with vLLM, which the worker extension does.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from vllm.config import LoadConfig, ModelConfig, VllmConfig
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader
from vllm.platforms import current_platform

from gnuq_serve.service.scorer.freed_memory import give_back
from gnuq_serve.vllm.names import LOAD_FORMAT
from gnuq_serve.weights.layout import Layout
from gnuq_serve.weights.shared_file import SharedFile
from gnuq_serve.weights.sharing import made_shareable
from gnuq_serve.weights.source import SourceRefused
from gnuq_serve.weights.tracing import CopyRecorder

_TRACED = "gnuq_traced"  # attribute of a loaded model: Traced, or why there is none

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traced:
    """Where each checkpoint tensor lies.

    Attributes:
        layout: of the tensors in the storages.
        storages: the engine's; held here, since a scorer may read them for as long as the engine lives.
        file: holds their version; on a CPU it is the one storage too.
        addresses: of the parameters and buffers that lie in the storages.
    """

    layout: Layout
    storages: list[torch.UntypedStorage]
    file: SharedFile
    addresses: frozenset[int]

    def still_of(self, model: nn.Module) -> bool:
        """Whether the engine has its weights where it had them when it loaded them."""
        return self.addresses <= {tensor.data_ptr() for _, tensor in _tensors(model)}


@register_model_loader(LOAD_FORMAT)
class TracingLoader(DefaultModelLoader):
    """As ``--load-format auto``, and the model knows afterwards where each checkpoint tensor lies in it."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(dataclasses.replace(load_config, load_format="auto"))
        self._recorder: CopyRecorder | None = None

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Load, see where everything is, and on a CPU put it where a scorer can map it."""
        model: nn.Module = super().load_model(vllm_config, model_config, prefix)
        recorder, self._recorder = self._recorder, None
        traced: Traced | str
        try:
            traced = _traced(model, recorder, vllm_config)
        except SourceRefused as error:
            traced = str(error)
            logger.warning("gnuq: no scorer can read the engine's weights: %s", error)
        setattr(model, _TRACED, traced)
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Load under the recorder."""
        if current_platform.is_cpu():
            _keep_linear_weights(model)
        self._recorder = CopyRecorder()
        with self._recorder:
            super().load_weights(model, model_config)
        self._recorder.loaded(_tensors(model))

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors."""
        weights = super().get_all_weights(model_config, model)
        return weights if self._recorder is None else self._recorder.watched(weights)


def traced_weights(model: nn.Module) -> Traced:
    """Where each checkpoint tensor lies in a model that this loader loaded.

    Raises:
        SourceRefused: another loader did, or this one could not follow.
    """
    traced: Traced | str | None = getattr(model, _TRACED, None)
    if traced is None:
        raise SourceRefused(f"vLLM loaded its weights another way: start it with --load-format {LOAD_FORMAT}")
    if isinstance(traced, str):
        raise SourceRefused(traced)
    return traced


def _traced(model: nn.Module, recorder: CopyRecorder | None, vllm_config: VllmConfig) -> Traced:
    if (why := _untraceable(vllm_config)) is not None:
        raise SourceRefused(why)
    if recorder is None:
        raise SourceRefused("vLLM loaded no weights")
    layout, storages = recorder.layout(_tensors(model))
    if not storages:
        raise SourceRefused("vLLM copied none of the checkpoint's tensors as it is")
    file, layout, storages = made_shareable(model, layout, storages)
    give_back()
    held = {storage._cdata for storage in storages}
    inside = (tensor for _, tensor in _tensors(model) if tensor.untyped_storage()._cdata in held)
    return Traced(layout, storages, file, frozenset(tensor.data_ptr() for tensor in inside))


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _untraceable(vllm_config: VllmConfig) -> str | None:
    if vllm_config.quant_config is not None:
        return f"the served weights are quantised ({vllm_config.model_config.quantization})"
    workers = vllm_config.parallel_config.world_size
    if workers > 1:
        return f"the served weights are split over {workers} workers (tensor or pipeline parallel)"
    return None


def _keep_linear_weights(model: nn.Module) -> None:
    """On a CPU vLLM packs linear weights for oneDNN and drops them, save in layers that carry this mark."""
    layers = [layer for layer in model.modules() if isinstance(layer, LinearBase)]
    for layer in layers:
        layer._cpu_skip_gemm_dispatch = True
    logger.warning(
        "gnuq: %d linear layers keep their weights as they are, for the scorer to read: without vLLM's packing "
        "the engine makes up to a third fewer tokens a second under load on some CPUs (no cost on a GPU)",
        len(layers),
    )
