"""What the scorer process scores with: a model on the weights that its configuration asks for."""

from __future__ import annotations

import gc
import logging
from typing import Any, NamedTuple

import msgspec
import torch

from gnuq_serve.scorer import Sample, Scorer
from gnuq_serve.service.consistency import tolerance
from gnuq_serve.service.scorer.messages import ScorerConfig, ScorerMemory
from gnuq_serve.weights.checkpoint import CheckpointError, check_same_vocabulary
from gnuq_serve.weights.checkpoint_source import CheckpointSource
from gnuq_serve.weights.layout import SharedWeights
from gnuq_serve.weights.room import own_bytes, weight_bytes
from gnuq_serve.weights.shared import SharedSource
from gnuq_serve.weights.source import SourceRefused, WeightSource

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A scorer.

    Attributes:
        scorer: ready to score.
        source: of its weights.
        not_shared: why that isn't the engine, where ``auto`` would rather have had its weights.
    """

    scorer: Scorer
    source: WeightSource
    not_shared: str | None = None


def load_scorer(config: ScorerConfig) -> Loaded:
    """The scorer, and where its weights come from.

    Raises:
        SourceRefused: the engine's weights are asked for by name and can't be had, or are not what the engine
            computes with.
        CheckpointError: the checkpoint can't be loaded, or has another vocabulary than the served one.
        UnsupportedModelError: the model's parameters can't all be counted.
    """
    if config.gpu_memory_fraction is not None:
        for device in range(torch.cuda.device_count()):
            torch.cuda.set_per_process_memory_fraction(config.gpu_memory_fraction, device)
    refused = config.shared_refused
    if refused is None and config.shared is not None:
        try:
            return _on_engines_weights(config, msgspec.json.decode(config.shared, type=SharedWeights))
        except SourceRefused as error:
            refused = str(error)
    if refused is None:
        return _on_a_checkpoint(config)
    if config.weights == "shared":
        raise SourceRefused(f"the engine's weights can't be scored with (scorer_weights: shared): {refused}")
    logger.warning(
        "the scorer loads a copy of the weights, since it can't have the engine's: %s. Ask for one from the "
        "start (scorer_weights: checkpoint), and an engine on a GPU leaves room for it",
        refused,
    )
    gc.collect()  # what was tried holds memory
    torch.cuda.empty_cache()
    try:
        return _on_a_checkpoint(config)._replace(not_shared=refused)
    except torch.OutOfMemoryError as error:
        raise CheckpointError(
            "no room for a copy of the weights beside the engine: start with --gnuq-scorer-weights checkpoint, "
            f"and it leaves room. Its own weights can't be scored with: {refused}"
        ) from error


def memory_of(scorer: Scorer, source: WeightSource, tokens: int) -> ScorerMemory:
    """What a scorer takes.

    Args:
        scorer: loaded.
        source: of its weights.
        tokens: positions in a full pass.
    """
    return ScorerMemory(
        weights=weight_bytes(scorer.model),
        own_weights=own_bytes(scorer.model, gpu_is_own=source.name != SharedSource.name),
        pass_tokens=tokens,
        pass_bytes=scorer.pass_bytes(tokens),
        budget=scorer.memory_budget,
    )


def _on_engines_weights(config: ScorerConfig, shared: SharedWeights) -> Loaded:
    source = SharedSource(shared, config.model, **_options(config))
    scorer = _scorer(source, config)
    _check_probe(scorer, source, shared)
    return Loaded(scorer, source)


def _on_a_checkpoint(config: ScorerConfig) -> Loaded:
    if config.model != config.served_model:
        check_same_vocabulary(config.model, config.served_model, trust_remote_code=config.trust_remote_code)
    source = CheckpointSource(
        config.model,
        device_map=_device_map(config),
        map_converted=config.weights == "auto",
        **_options(config),
    )
    return Loaded(_scorer(source, config), source)


def _options(config: ScorerConfig) -> dict[str, Any]:
    """Of either source."""
    return {
        "dtype": config.dtype,
        "device": config.device,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "config_overrides": config.config_overrides,
    }


def _scorer(source: WeightSource, config: ScorerConfig) -> Scorer:
    return Scorer.from_model(
        source.load(), max_batch_tokens=config.max_batch_tokens, memory_budget=config.memory_budget
    )


def _device_map(config: ScorerConfig) -> str | None:
    """How a copy of the weights is split over GPUs, where the engine's are split; None: it isn't."""
    if config.engine_workers == 1:
        return config.device_map
    gpus, device_map = torch.cuda.device_count(), config.device_map
    if device_map is None and config.device == "auto" and gpus > 1:
        device_map = "balanced"
    logger.warning(
        "the engine's weights are split over %d workers, where no scorer can read them: ours loads a "
        "copy of its own, %s",
        config.engine_workers,
        f"split over {gpus} GPUs (scorer_device_map: {device_map})" if device_map else "on one device",
    )
    return device_map


def _check_probe(scorer: Scorer, source: WeightSource, shared: SharedWeights) -> None:
    """Whether the scorer reads a sample as the engine did.

    Raises:
        SourceRefused: it doesn't.
    """
    expected = shared.probe_log_probability
    if expected is None or source.version() != shared.version:
        return  # the engine has had other weights since
    (score,) = scorer.score([Sample(shared.probe_ids[:1], shared.probe_ids[1:])])
    found = score.log_probability
    if source.version() != shared.version:
        return
    if found is None or abs(found - expected) > tolerance(len(shared.probe_ids), scorer.dtype):
        raise SourceRefused(
            f"on the engine's weights transformers' model gives a sample the log-probability {found}, and the "
            f"engine {expected}: they don't compute the same. Score with scorer_weights: checkpoint"
        )
