"""Offline use: ``vllm.LLM``, with an uncertainty on every completion."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from vllm import LLM, RequestOutput, SamplingParams

from gnuq_serve.calibration import Calibration
from gnuq_serve.calibration.binding import offline_parts
from gnuq_serve.scorer import Sample, Scorer
from gnuq_serve.service.consistency import check_log_probability
from gnuq_serve.uncertainty import Uncertainty
from gnuq_serve.vllm.names import EXTENSION, LOAD_FORMAT
from gnuq_serve.vllm.served_model import served_model
from gnuq_serve.vllm.worker_scorer import WorkerScorer
from gnuq_serve.weights.checkpoint import check_same_vocabulary

logger = logging.getLogger(__name__)


class UncertaintyLLM:
    """A ``vllm.LLM`` whose completions carry ``.uncertainty``.

    Scoring takes place after generation: in this process with a PyTorch copy of the same weights, or by vLLM's
    worker on its own. Everything else that ``vllm.LLM`` has is reached through this object.
    """

    def __init__(
        self,
        model: str,
        *,
        scorer_model: str | None = None,
        scorer_device: str = "auto",
        scorer_weights: Literal["checkpoint", "shared"] = "checkpoint",
        calibration: Calibration | str | Path | None = None,
        **vllm_args: Any,
    ) -> None:
        """Load the engine and the scorer.

        Args:
            model: as for ``vllm.LLM``.
            scorer_model: checkpoint to score with; the served model by default.
            scorer_device: device of the scorer's weights.
            scorer_weights: ``"checkpoint"``: a copy, in this process; ``"shared"``: the engine's own tensors, by
                its worker, in the engine's device and dtype, without a copy. On a CPU the engine is then slower,
                by up to a third under load.
            calibration: gives each uncertainty ``p_correct`` and a decision; or the path of its file.
            **vllm_args: every other argument of ``vllm.LLM``.

        Raises:
            CalibrationError: the calibration's file can't be used.
            CheckpointError: the scorer's checkpoint can't be loaded, or has another vocabulary.
            SourceRefused: the engine's tensors can't be scored with; the message says why.
            UnsupportedModelError: a module of the model has no gradient-norm rule.
        """
        if isinstance(calibration, str | Path):
            calibration = Calibration.load(calibration)
        self.calibration = calibration
        if scorer_model not in (None, model):  # before the engine takes its time to start
            check_same_vocabulary(
                str(scorer_model), model, trust_remote_code=vllm_args.get("trust_remote_code", False)
            )
        if scorer_weights == "shared":
            if scorer_model not in (None, model):
                raise ValueError(f"scorer_weights='shared' and scorer_model={scorer_model!r}: choose one")
            sharing = {"load_format": LOAD_FORMAT, "worker_extension_cls": EXTENSION}
            if taken := sharing.keys() & vllm_args.keys():
                raise ValueError(f"scorer_weights='shared' sets {min(taken)} itself: leave it out")
            vllm_args |= sharing
        self.llm = LLM(model=model, **vllm_args)
        self._served = served_model(self.llm.model_config)
        scored = self._served.or_instead(scorer_model)
        if scorer_weights == "shared":
            self.scorer: Scorer | WorkerScorer = WorkerScorer(self.llm, self._served.dtype)
            return
        self.scorer = Scorer.from_pretrained(
            scored.model,
            dtype=scored.dtype,
            device=scorer_device,
            revision=scored.revision,
            trust_remote_code=scored.trust_remote_code,
            config_overrides=scored.config_overrides,
        )

    def __getattr__(self, name: str) -> Any:
        if name == "llm":  # not built yet: no engine to ask
            raise AttributeError(name)
        return getattr(self.llm, name)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Any = True,
        **kwargs: Any,
    ) -> list[RequestOutput]:
        """As ``vllm.LLM.generate``; each completion of each output has ``.uncertainty``."""
        params = _with_logprobs(sampling_params or self.llm.get_default_sampling_params())
        outputs = self.llm.generate(prompts, params, use_tqdm=use_tqdm, **kwargs)
        return self._scored(outputs, sampling_params, progress=bool(use_tqdm))

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Any = True,
        **kwargs: Any,
    ) -> list[RequestOutput]:
        """As ``vllm.LLM.chat``; each completion of each output has ``.uncertainty``."""
        params = _with_logprobs(sampling_params or self.llm.get_default_sampling_params())
        outputs = self.llm.chat(messages, params, use_tqdm=use_tqdm, **kwargs)
        several = bool(messages) and isinstance(messages[0], list)
        chats = messages if several else [messages]
        return self._scored(outputs, sampling_params, chats, progress=bool(use_tqdm))

    def _scored(
        self, outputs: list[RequestOutput], asked: Any, chats: Sequence[Any] | None = None, *, progress: bool
    ) -> list[RequestOutput]:
        asked_each = asked if isinstance(asked, Sequence) else [asked] * len(outputs)
        completions = [
            (output, completion, params, chat)
            for output, params, chat in zip(outputs, asked_each, chats or [None] * len(outputs), strict=True)
            for completion in output.outputs
        ]
        reasons = [_skip_reason(output) for output, *_ in completions]
        samples = [
            Sample(output.prompt_token_ids, list(completion.token_ids))
            for (output, completion, *_), reason in zip(completions, reasons, strict=True)
            if reason is None
        ]
        scored = iter(self._score(samples, progress=progress))
        for (output, completion, params, chat), reason in zip(completions, reasons, strict=True):
            if reason is not None:
                completion.uncertainty = Uncertainty.skipped(reason)
            else:
                # With a grammar, vLLM's logprobs are taken after its mask.
                comparable = self._served.raw_logprobs and getattr(params, "structured_outputs", None) is None
                served = completion.cumulative_logprob if comparable else None
                completion.uncertainty = check_log_probability(
                    next(scored), served, self._served.dtype, self.scorer.dtype
                )
                if (approximate := self._served.approximate_weights) is not None:
                    completion.uncertainty = completion.uncertainty.replace(
                        warnings=(*completion.uncertainty.warnings, approximate)
                    )
            completion.uncertainty = self._decided(output, completion, params, chat)
            if params is None or params.logprobs is None:
                completion.logprobs = completion.cumulative_logprob = None
        return outputs

    def _decided(self, output: RequestOutput, completion: Any, params: Any, chat: Any) -> Uncertainty:
        if self.calibration is None:
            return completion.uncertainty  # type: ignore[no-any-return]
        return self.calibration.apply(
            completion.uncertainty,
            prompt_tokens=len(output.prompt_token_ids or ()),
            turns=None if chat is None else sum(message.get("role") == "user" for message in chat),
            finish_reason=completion.finish_reason,
            parts=offline_parts(params or self.llm.get_default_sampling_params(), chat),
        )

    def _score(self, samples: list[Sample], *, progress: bool) -> list[Uncertainty]:
        try:
            return self.scorer.score(samples, on_invalid="fail", progress=progress)
        except Exception as error:  # out of memory, say: the answers are there and must not be lost
            logger.exception("%d answers could not be scored", len(samples))
            return [Uncertainty.failed(f"{type(error).__name__}: {error}"[:500])] * len(samples)


def _with_logprobs(params: Any) -> Any:
    """The same parameters with the chosen token's logprob, to check the scorer's with."""
    if isinstance(params, Sequence):
        return [_with_logprobs(one) for one in params]
    if params.logprobs is not None:
        return params
    params = copy.copy(params)
    params.logprobs = 0
    return params


def _skip_reason(output: RequestOutput) -> str | None:
    if output.lora_request is not None:
        return "adapter not loaded: the scorer has the base model only"
    if getattr(output, "multi_modal_placeholders", None):
        return "image, audio or video in the prompt"
    if not output.prompt_token_ids:
        return "the prompt has no token ids"
    return None
