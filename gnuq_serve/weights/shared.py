"""The source ``shared``: vLLM's own tensors, in memory that its worker shares, on a CPU or a GPU."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from gnuq_serve.errors import first_line
from gnuq_serve.weights.assemble import assemble
from gnuq_serve.weights.checkpoint import load_config, parse_device, parse_dtype
from gnuq_serve.weights.cuda_ipc import opened
from gnuq_serve.weights.layout import SharedWeights
from gnuq_serve.weights.safetensors_file import files_of, mapped
from gnuq_serve.weights.samples import some_values
from gnuq_serve.weights.shared_file import MappedFile
from gnuq_serve.weights.source import SourceRefused

logger = logging.getLogger(__name__)


class SharedSource:
    """A ``WeightSource``: the Hugging Face model of a served checkpoint, on vLLM's memory."""

    name = "shared"

    def __init__(
        self,
        weights: SharedWeights,
        model: str,
        *,
        dtype: str,
        device: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        config_overrides: Mapping[str, Any] | None = None,
    ) -> None:
        """Nothing is mapped yet.

        Args:
            weights: the worker's.
            model: served checkpoint; of it, only the configuration is read, and a few tensors to compare.
            dtype: that vLLM serves in; this and the rest as for ``load_checkpoint``.
            device: where the scorer is meant to be; the weights are where they are.
            revision: of the checkpoint.
            trust_remote_code: run code that comes with it.
            config_overrides: entries of its configuration to replace.
        """
        self._weights, self._model, self._dtype, self._wanted = weights, model, dtype, device
        self._source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._overrides = config_overrides
        self._file: MappedFile | None = None
        self._gpu: torch.device | None = None

    def load(self) -> nn.Module:
        """See ``WeightSource``."""
        dtype = parse_dtype(self._dtype)
        if dtype is None:
            raise SourceRefused("dtype=auto: name the dtype that vLLM serves in")
        layout = self._weights.layout
        config = load_config(self._model, config_overrides=self._overrides, **self._source)
        tensors = layout.on(self._storages())
        if self.version() == 0:  # once they have changed they need not be the checkpoint's
            self._compare(tensors)
        return assemble(
            config,
            tensors,
            dtype=dtype,
            untraced=layout.untraced,
            trust_remote_code=bool(self._source["trust_remote_code"]),
        )

    def _storages(self) -> list[torch.UntypedStorage]:
        """The engine's.

        Raises:
            SourceRefused: they can't be mapped, or are not where the scorer is meant to be.
            CheckpointError: there is no such place.
        """
        if self._weights.gpu is None:
            self._file = MappedFile(self._weights.path, self._weights.layout.storages[0])
            storages = [self._file.storage]
        else:
            self._file = MappedFile(self._weights.path)
            storages = opened(self._weights.gpu)
            self._gpu = storages[0].device
        found = storages[0].device
        if self._wanted != "auto" and self._wanted != found.type and parse_device(self._wanted) != found:
            raise SourceRefused(
                f"the engine's weights are on {found}, and scorer_device is {self._wanted}: leave it out, or use "
                "scorer_weights: checkpoint"
            )
        return storages

    def _compare(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """With the checkpoint: every tensor at some of its values, those of the first layer at all.

        Raises:
            SourceRefused: one differs.
        """
        try:
            checkpoint = mapped(files_of(self._model, self._source["revision"]))
        except (OSError, SafetensorError) as error:
            logger.warning("the engine's weights can't be compared with the checkpoint: %s", first_line(error))
            return
        if not checkpoint:
            logger.warning("the engine's weights can't be compared with the checkpoint: it has no safetensors")
        for name, expected in checkpoint.items():
            if name not in tensors:
                continue  # where it is needed, assemble says why it isn't there
            found = tensors[name]
            if found.shape == expected.shape and _equal(found, expected, every=".0." in name):
                continue
            if self.version() == 0:
                raise SourceRefused(f"{name} differs between the engine and the checkpoint {self._model!r}")

    def version(self) -> int | None:
        """See ``WeightSource``."""
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)  # a pass has read the weights when the GPU is done with it
        return None if self._file is None else self._file.version


def _equal(found: torch.Tensor, checkpoint: torch.Tensor, *, every: bool) -> bool:
    """Whether the engine's tensor is the checkpoint's in its dtype, at every value or at some."""
    if not every:
        found, checkpoint = some_values(found), some_values(checkpoint)
    return torch.equal(found, checkpoint.to(found.device, found.dtype))
