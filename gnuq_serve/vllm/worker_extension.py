"""What our side of vLLM's worker does: shares the weights that it serves, and says when they change.

Chosen by ``--worker-extension-cls``; vLLM makes it a base of its worker, and methods can be called over
``collective_rpc``. Their names begin with ``gnuq_``, since a name that the worker has would be refused.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform

from gnuq_serve.scorer import Sample, Scorer
from gnuq_serve.vllm.loader import Traced, traced_weights
from gnuq_serve.vllm.served_model import served_model
from gnuq_serve.weights.assemble import assemble
from gnuq_serve.weights.checkpoint import load_config
from gnuq_serve.weights.layout import SharedWeights
from gnuq_serve.weights.sharing import shared_weights
from gnuq_serve.weights.source import SourceRefused

logger = logging.getLogger(__name__)

# Of the worker: methods that write weights, and whether these are whole again when they return.
_CHANGES = {"reload_weights": True, "update_weights": False, "finish_weight_update": True}


class GnuqWorkerExtension:
    """Methods that vLLM's worker gains."""

    def gnuq_share_weights(self) -> dict[str, str]:
        """Where this worker's weights can be mapped; asked again, the same answer.

        Returns:
            ``weights``: a ``SharedWeights`` in JSON; or ``refused``: why there are none.
        """
        known: SharedWeights | None = getattr(self, "_gnuq_weights", None)
        if known is None:
            try:
                known = self._gnuq_weights = _shared(self, traced := self._gnuq_traced())
            except SourceRefused as error:
                return {"refused": str(error)}
            self._gnuq_file = traced.file
        if known.probe_log_probability is None:
            known = msgspec.structs.replace(known, version=self._gnuq_file.version)
        return {"weights": msgspec.json.encode(known).decode()}

    def gnuq_keep_probe(self, ids: list[int], log_probability: float, version: int) -> None:
        """Keep what vLLM made of a sample, for ``gnuq_share_weights`` to tell; the first one counts.

        Args:
            ids: the sample's.
            log_probability: of all its tokens but the first.
            version: of the weights at that time.
        """
        if self._gnuq_weights.probe_log_probability is None:
            self._gnuq_weights = msgspec.structs.replace(
                self._gnuq_weights, probe_ids=tuple(ids), probe_log_probability=log_probability, version=version
            )

    def gnuq_score(
        self, samples: list[tuple[list[int], list[int]]], options: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Score answers here, on this worker's own tensors; nothing is generated meanwhile.

        Args:
            samples: prompt ids and answer ids of each.
            options: as for ``Scorer.score``.

        Returns:
            Their uncertainties, in JSON form.

        Raises:
            SourceRefused: the model's tensors can't be had; the message says why.
        """
        scorer: Scorer | None = getattr(self, "_gnuq_scorer", None)
        if scorer is None:
            scorer = self._gnuq_scorer = _scorer_of(self, self._gnuq_traced())
        given = [Sample(prompt_ids, answer_ids) for prompt_ids, answer_ids in samples]
        return [result.to_dict() for result in scorer.score(given, on_invalid="fail", **options)]

    def _gnuq_traced(self) -> Traced:
        """Where the weights are; from the first time on, this worker tells of their changes.

        Raises:
            SourceRefused: that isn't known.
        """
        worker: Any = self
        traced = traced_weights(worker.model_runner.get_model())
        if not getattr(self, "_gnuq_announces", False):
            _announce_changes(worker, traced)
            self._gnuq_announces = True
        return traced


def _shared(worker: Any, traced: Traced) -> SharedWeights:
    """What another process is told of the weights.

    Raises:
        SourceRefused: it can't read them.
    """
    if worker.model_config.enable_cumem_allocator and not current_platform.is_cpu():
        raise SourceRefused(
            "vLLM's sleep mode (--enable-sleep-mode, --enable-cumem-allocator) keeps the engine's weights in "
            "memory that no other process can open"
        )
    return shared_weights(traced.file, traced.layout, traced.storages)


def _scorer_of(worker: Any, traced: Traced) -> Scorer:
    served = served_model(worker.model_config)
    config = load_config(
        served.model,
        revision=served.revision,
        trust_remote_code=served.trust_remote_code,
        config_overrides=served.config_overrides,
    )
    # A model that vLLM runs by transformers' own code it changes in place; the copy must find its configuration.
    with set_current_vllm_config(worker.vllm_config):
        model = assemble(
            config,
            traced.layout.on(traced.storages),
            dtype=worker.model_config.dtype,
            untraced=traced.layout.untraced,
            trust_remote_code=served.trust_remote_code,
        )
    return Scorer.from_model(model)


def _announce_changes(worker: Any, traced: Traced) -> None:
    """Have this worker's methods that write weights raise the version, before and after."""
    file, device = traced.file, traced.storages[0].device

    def announced(method: Callable[..., Any], whole_after: bool) -> Callable[..., Any]:
        @functools.wraps(method)
        def announcing(*args: Any, **kwargs: Any) -> Any:
            worker._gnuq_scorer = None  # what it knows of the weights is over
            file.begin_change()
            result = method(*args, **kwargs)  # where it fails, the weights may be half changed and stay so
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # until then the GPU may go on writing
            if whole_after and traced.still_of(worker.model_runner.get_model()):
                file.end_change()
            elif whole_after:
                logger.error("gnuq: the engine moved its weights in memory: no scorer can read them any more")
            return result

        return announcing

    for name, whole_after in _CHANGES.items():
        setattr(worker, name, announced(getattr(worker, name), whole_after))
