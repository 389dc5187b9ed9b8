"""How much memory scoring will need, before anything is loaded: from the configuration alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gnuq_serve.gradnorm import cover
from gnuq_serve.gradnorm.linear import TILE_BYTES
from gnuq_serve.gradnorm.memory import MemoryModel, measure
from gnuq_serve.weights.assemble import merged
from gnuq_serve.weights.checkpoint import load_config, parse_dtype
from gnuq_serve.weights.empty import empty_model
from gnuq_serve.weights.room import weight_bytes

_VOCABULARY = 64  # of the small models; what the true one adds is known without trying


@dataclass(frozen=True, slots=True)
class Estimate:
    """In bytes, and what speaks against scoring without a copy.

    Attributes:
        weights: of one copy.
        pass_bytes: of one pass beyond them.
        unshareable: why no scorer can read an engine's weights of this model; None: nothing known.
    """

    weights: int
    pass_bytes: int
    unshareable: str | None = None


def estimate(
    model: str,
    dtype: str,
    tokens: int,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    config_overrides: Mapping[str, Any] | None = None,
) -> Estimate:
    """What a scorer of a checkpoint will take: weights by their shapes, a pass by trying one and two layers.

    Layers are taken to be alike. Every position of the pass counts as one of an answer.

    Args:
        model: folder or hub name; only its configuration is read.
        dtype: of the weights; ``"auto"``: the configuration's.
        tokens: positions in a pass.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the checkpoint.
        config_overrides: entries of the configuration to replace.

    Raises:
        CheckpointError: no usable configuration, or an unknown dtype.
        UnsupportedModelError: the model's parameters can't all be counted.
    """
    config = load_config(
        model, revision=revision, trust_remote_code=trust_remote_code, config_overrides=config_overrides
    )
    chosen = parse_dtype(dtype) or config.dtype or torch.float32
    options: dict[str, Any] = {"dtype": chosen, "trust_remote_code": trust_remote_code}
    whole = empty_model(config, **options)
    whole.tie_weights()
    layers = config.get_text_config().num_hidden_layers
    one, two = _measured(config, 1, options), _measured(config, min(2, layers), options)
    memory = _extended(one, two, layers, whole.get_input_embeddings().weight)
    return Estimate(weight_bytes(whole), memory.bytes(tokens, 1, tokens), _unshareable(config, whole))


def _unshareable(config: Any, model: nn.Module) -> str | None:
    if getattr(config, "quantization_config", None) is not None:
        return "the checkpoint is quantised"
    if (name := merged(model)) is not None:
        return f"{name}: transformers makes it of several tensors of the checkpoint"
    return None


def _measured(config: Any, layers: int, options: Mapping[str, Any]) -> MemoryModel:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:  # one entry for each layer
            setattr(text, name, value[:layers])
    text.num_hidden_layers, text.vocab_size = layers, _VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    empty = empty_model(config, **options)
    model: nn.Module = empty.to_empty(device="cpu")
    empty.tie_weights()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()  # only sizes count
    model = model.eval().requires_grad_(False)
    return measure(model, cover(model))


def _extended(one: MemoryModel, two: MemoryModel, layers: int, embedding: torch.Tensor) -> MemoryModel:
    """To all layers, and to the true vocabulary."""

    def line(name: str) -> float:
        first, second = float(getattr(one, name)), float(getattr(two, name))
        return first + (layers - 1) * (second - first)

    vocabulary, width = embedding.shape
    wide = one.wide_logits // _VOCABULARY
    return dataclasses.replace(
        two,
        per_token=line("per_token"),
        per_pair=max(0.0, line("per_pair")),
        per_pair_windowed=max(0.0, line("per_pair_windowed")),
        logits=vocabulary * embedding.element_size(),
        wide_logits=vocabulary * wide,
        head_gradient=min(vocabulary * width * wide, TILE_BYTES),
        blocks=layers,
    )
