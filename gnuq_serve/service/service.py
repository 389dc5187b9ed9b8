"""From the answers of a response to their uncertainties, whatever happens to the scorer."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gnuq_serve.score_options import ScoreOptions
from gnuq_serve.service.answer import Answer, Span, ThinkingLength
from gnuq_serve.service.consistency import check_log_probability
from gnuq_serve.service.messages import ScorerConfig, ScorerState
from gnuq_serve.service.request_plan import DEFAULT_OPTIONS, RequestOptions
from gnuq_serve.service.result_store import ResultStore, ResultStoreError, default_path
from gnuq_serve.service.scorer_client import DeadlineError, QueueFullError, ScorerClient, ScorerUnavailableError
from gnuq_serve.service.settings import Settings
from gnuq_serve.uncertainty import Uncertainty

logger = logging.getLogger(__name__)

GRAMMAR_WARNING = (
    "a grammar forced tokens: their probability is the plain model's, and is not checked against the engine's"
)


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine has loaded; the scorer loads the same."""

    model: str
    dtype: str
    revision: str | None = None
    trust_remote_code: bool = False
    config_overrides: dict[str, Any] = {}
    raw_logprobs: bool = True
    end_of_turn_ids: tuple[int, ...] = ()  # the tokenizer's own first

    def or_instead(self, model: str | None) -> ServedModel:
        """What the scorer loads: the same, or another checkpoint without this one's revision and overrides."""
        if model is None or model == self.model:
            return self
        return msgspec.structs.replace(self, model=model, revision=None, config_overrides={})


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """What the service knows of the server that it works in; looked up at the time of each request.

    Attributes:
        name: what tells this server from others of the machine; the same in all its processes.
        adapters: names of the LoRA adapters that it knows.
        parses: whether it takes answers apart with a tool or reasoning parser; None: not known.
        thinking_length: finds the end of the thinking in an answer; None: there is no reasoning parser.
    """

    name: str = "default"
    adapters: Callable[[], Collection[str]] = tuple
    parses: Callable[[], bool | None] = lambda: True
    thinking_length: ThinkingLength | None = None


class UncertaintyService:
    """Scores answers in the scorer process; never raises and never takes longer than the deadline."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.server = Server()
        self.served: ServedModel | None = None
        self._client: ScorerClient | None = None
        self._store: ResultStore | None = None
        self._background: set[asyncio.Task[Any]] = set()

    def start(self, served: ServedModel, server: Server | None = None) -> None:
        """Start the scorer process for the model that the server has loaded.

        Args:
            served: what the engine loaded.
            server: what else there is to know of the server.
        """
        settings = self.settings
        scored = served.or_instead(settings.scorer_model)
        self.served = served
        self.server = server or self.server
        self._store = self._new_store()
        self._client = ScorerClient(
            ScorerConfig(
                model=scored.model,
                served_model=served.model,
                dtype=served.dtype if settings.scorer_dtype == "auto" else settings.scorer_dtype,
                device=settings.scorer_device,
                threads=settings.scorer_threads,
                max_batch_tokens=settings.max_batch_tokens,
                memory_budget=settings.memory_budget,
                revision=scored.revision,
                trust_remote_code=scored.trust_remote_code,
                config_overrides=scored.config_overrides,
            ),
            max_queue=settings.max_queue,
            on_overload=settings.on_overload,
        )
        self._client.start()

    async def stop(self) -> None:
        """End the scorer process; answers that wait for it fail, and are kept as failed."""
        if self._client is not None:
            await self._client.stop()
        if self._background:
            await asyncio.wait(self._background)
        if self._store is not None:
            self._store.close()
            self._store = None

    @property
    def state(self) -> ScorerState:
        """How the scorer process is."""
        return ScorerState(status="starting") if self._client is None else self._client.state

    async def score(
        self, answers: Sequence[Answer | None], options: RequestOptions = DEFAULT_OPTIONS
    ) -> list[dict[str, Any]]:
        """One uncertainty for each answer, in JSON form: scored, skipped or failed, with its reason, or pending.

        Args:
            answers: what to score; None for an answer without token ids.
            options: what the client asked.
        """
        ids = [_new_id() for _ in answers]
        if options.wait:
            deadline = self.settings.deadline_seconds
            results = await asyncio.gather(
                *(
                    self._score_one(answer, options, id_, deadline)
                    for answer, id_ in zip(answers, ids, strict=True)
                )
            )
            self._keep_soon(results)
            return results
        return await asyncio.gather(
            *(self._score_later(answer, options, id_) for answer, id_ in zip(answers, ids, strict=True))
        )

    def skip(self, answers: int, reason: str) -> list[dict[str, Any]]:
        """As many uncertainties without a score, with the reason."""
        results = [Uncertainty.skipped(reason).replace(id=_new_id()).to_dict() for _ in range(answers)]
        self._keep_soon(results)
        return results

    async def result(self, result_id: str) -> dict[str, Any] | None:
        """The result of an id, as ``score`` gave or will give it; None for an unknown or forgotten one.

        Raises:
            ResultStoreError: results can't be read.
        """
        if self._store is None:
            raise ResultStoreError("results are not kept: see the server's log")
        return await self._store.get(result_id)

    async def _score_one(
        self, answer: Answer | None, options: RequestOptions, result_id: str, deadline_seconds: float
    ) -> dict[str, Any]:
        start = time.perf_counter()
        if answer is None:
            return Uncertainty.skipped("the response carries no token ids").replace(id=result_id).to_dict()
        spans = {"answer": answer.answer_span}
        if options.thinking:
            spans["thinking"] = answer.thinking_span
        scores = await asyncio.gather(
            *(self._score_span(span, options, deadline_seconds) for span in spans.values())
        )
        by_name = {
            name: score.replace(span=name if score.span else None)
            for name, score in zip(spans, scores, strict=True)
        }
        warnings = answer.warnings + ((GRAMMAR_WARNING,) if answer.grammar else ())
        headline = by_name["answer"]
        if headline.status == "scored":
            headline = headline.replace(warnings=(*headline.warnings, *warnings))
        result = headline.replace(
            id=result_id, tool_call=answer.tool_call, seconds=time.perf_counter() - start
        ).to_dict()
        if options.thinking:
            result["thinking"] = None if spans["thinking"] is None else by_name["thinking"].to_dict()
        return result

    async def _score_span(
        self, span: Span | None, options: RequestOptions, deadline_seconds: float
    ) -> Uncertainty:
        if span is None:
            return Uncertainty.skipped("there is no answer after the thinking")
        tokens, most = len(span.prompt_ids) + len(span.answer_ids), self.settings.max_score_tokens
        if tokens > most:
            return Uncertainty.skipped(f"prompt and answer have {tokens} tokens (max_score_tokens={most})")
        if self._client is None or self.served is None:
            return Uncertainty.failed("the scorer is not started yet")
        allowed, warnings = self._allowed(options, len(span.answer_ids))
        try:
            result = await self._client.score(span.prompt_ids, span.answer_ids, deadline_seconds, allowed)
        except (QueueFullError, DeadlineError) as error:
            return Uncertainty.skipped(str(error))
        except ScorerUnavailableError as error:
            return Uncertainty.failed(str(error))
        except Exception as error:  # the answer goes out whatever breaks here
            logger.exception("scoring failed")
            return Uncertainty.failed(f"internal error: {type(error).__name__}")
        if result.status == "scored":
            result = result.replace(warnings=(*result.warnings, *warnings))
        if not self.served.raw_logprobs:
            return result
        dtypes = (self.served.dtype, self.state.dtype or self.served.dtype)
        return check_log_probability(result, span.log_probability, *dtypes)

    def _allowed(self, options: RequestOptions, answer_tokens: int) -> tuple[ScoreOptions, list[str]]:
        """What the scorer is asked to do, and warnings of what the operator does not allow."""
        settings, warnings = self.settings, []
        trace, semantic = options.trace, options.semantic
        if trace and answer_tokens > settings.max_trace_tokens:
            trace = False
            warnings.append(
                f"no trace: the answer has {answer_tokens} tokens (max_trace_tokens={settings.max_trace_tokens})"
            )
        if semantic and not settings.allow_semantic:
            semantic = False
            warnings.append("no semantic signals: not allowed here (allow_semantic=false)")
        return ScoreOptions(options.mode or settings.mode, trace, semantic), warnings

    async def _score_later(
        self, answer: Answer | None, options: RequestOptions, result_id: str
    ) -> dict[str, Any]:
        pending = Uncertainty(status="pending", id=result_id).to_dict()
        deadline = self.settings.background_deadline_seconds
        try:
            if self._store is None:
                raise ResultStoreError("results are not kept: see the server's log")
            # Well after the deadline: a result that is written late must not look lost before.
            await self._store.put(pending, pending_seconds=deadline + 60)
        except ResultStoreError as error:
            return Uncertainty.failed(str(error)).replace(id=result_id).to_dict()

        async def score() -> None:
            await self._keep(await self._score_one(answer, options, result_id, deadline))

        self._in_background(score())
        return pending

    async def _keep(self, result: dict[str, Any]) -> None:
        if self._store is None:
            return
        try:
            await self._store.put(result)
        except ResultStoreError as error:
            logger.error("%s", error)

    def _keep_soon(self, results: Sequence[dict[str, Any]]) -> None:
        if self._store is not None:
            for result in results:
                self._in_background(self._keep(result))

    def _in_background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._background.discard)

    def _new_store(self) -> ResultStore | None:
        settings = self.settings
        if settings.keep_results == 0:
            return None
        try:
            path = Path(settings.results_path) if settings.results_path else default_path(self.server.name)
        except (OSError, ResultStoreError) as error:
            logger.error("results are not kept: %s", error)
            return None
        return ResultStore(path, keep=settings.keep_results, keep_seconds=settings.keep_results_seconds)


def _new_id() -> str:
    # Random: vLLM's response ids are built from a header that clients send.
    return f"unc-{secrets.token_hex(12)}"
