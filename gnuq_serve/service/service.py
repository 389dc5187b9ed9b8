"""From the answers of a response to their uncertainties, whatever happens to the scorer."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from gnuq_serve.service.consistency import check_log_probability
from gnuq_serve.service.messages import SampleMessage, ScorerConfig, ScorerState
from gnuq_serve.service.response_edit import Answer
from gnuq_serve.service.scorer_client import ScorerClient, ScorerUnavailableError
from gnuq_serve.service.settings import Settings
from gnuq_serve.uncertainty import Uncertainty

logger = logging.getLogger(__name__)


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine has loaded; the scorer loads the same."""

    model: str
    dtype: str
    revision: str | None = None
    trust_remote_code: bool = False
    config_overrides: dict[str, Any] = {}
    raw_logprobs: bool = True

    def or_instead(self, model: str | None) -> ServedModel:
        """What the scorer loads: the same, or another checkpoint without this one's revision and overrides."""
        if model is None or model == self.model:
            return self
        return msgspec.structs.replace(self, model=model, revision=None, config_overrides={})


class UncertaintyService:
    """Scores answers in the scorer process; never raises and never takes longer than the deadline."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._served: ServedModel | None = None
        self._client: ScorerClient | None = None
        self._adapters: Callable[[], Collection[str]] = tuple

    def start(self, served: ServedModel, adapters: Callable[[], Collection[str]] = tuple) -> None:
        """Start the scorer process for the model that the server has loaded.

        Args:
            served: what the engine loaded.
            adapters: names of the LoRA adapters that the server knows at the time of the call.
        """
        settings = self.settings
        scored = served.or_instead(settings.scorer_model)
        self._served = served
        self._adapters = adapters
        self._client = ScorerClient(
            ScorerConfig(
                model=scored.model,
                served_model=served.model,
                dtype=served.dtype if settings.scorer_dtype == "auto" else settings.scorer_dtype,
                device=settings.scorer_device,
                threads=settings.scorer_threads,
                max_batch_tokens=settings.max_batch_tokens,
                revision=scored.revision,
                trust_remote_code=scored.trust_remote_code,
                config_overrides=scored.config_overrides,
            )
        )
        self._client.start()

    async def stop(self) -> None:
        """End the scorer process."""
        if self._client is not None:
            await self._client.stop()

    @property
    def adapters(self) -> Collection[str]:
        """Names of the LoRA adapters that the server knows."""
        return self._adapters()

    @property
    def state(self) -> ScorerState:
        """How the scorer process is."""
        return ScorerState(status="starting") if self._client is None else self._client.state

    async def score(self, answers: list[Answer | None]) -> list[Uncertainty]:
        """One uncertainty for each answer: scored, skipped or failed, with its reason.

        Args:
            answers: what to score; None for an answer without token ids.
        """
        start = time.perf_counter()
        known = [answer for answer in answers if answer is not None]
        scored = iter(await self._ask(known)) if known else iter(())
        seconds = time.perf_counter() - start
        results = []
        for answer in answers:
            result = Uncertainty.skipped("the response carries no token ids") if answer is None else next(scored)
            if answer is not None and self._served is not None and self._served.raw_logprobs:
                dtypes = (self._served.dtype, self.state.dtype or self._served.dtype)
                result = check_log_probability(result, answer.log_probability, *dtypes)
            results.append(result.replace(id=_new_id(), seconds=seconds))
        return results

    def skip(self, answers: int, reason: str) -> list[Uncertainty]:
        """As many uncertainties without a score, with the reason."""
        return [Uncertainty.skipped(reason).replace(id=_new_id()) for _ in range(answers)]

    async def _ask(self, answers: list[Answer]) -> list[Uncertainty]:
        if self._client is None:
            return [Uncertainty.failed("the scorer is not started yet")] * len(answers)
        samples = [SampleMessage(answer.prompt_ids, answer.answer_ids) for answer in answers]
        try:
            return await self._client.score(samples, self.settings.deadline_seconds)
        except ScorerUnavailableError as error:
            return [Uncertainty.failed(str(error))] * len(answers)
        except Exception as error:  # the answer goes out whatever breaks here
            logger.exception("scoring failed")
            return [Uncertainty.failed(f"internal error: {type(error).__name__}")] * len(answers)


def _new_id() -> str:
    # Random: vLLM's response ids are built from a header that clients send.
    return f"unc-{secrets.token_hex(12)}"
