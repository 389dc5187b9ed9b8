"""From the answers of a response to their uncertainties, whatever happens to the scorer."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from pydantic import ValidationError

from gnuq_serve.calibration import Calibration
from gnuq_serve.service.answer import Answer, Span
from gnuq_serve.service.consistency import check_log_probability
from gnuq_serve.service.decisions import Answered, Decisions
from gnuq_serve.service.operator.rollout import RELOADABLE, Rollout
from gnuq_serve.service.requests.caps import allowed_options
from gnuq_serve.service.requests.request_plan import DEFAULT_OPTIONS, RequestOptions, nowhere
from gnuq_serve.service.result_store import ResultStore, ResultStoreError, default_path
from gnuq_serve.service.scorer.client import DeadlineError, QueueFullError, ScorerClient, ScorerUnavailableError
from gnuq_serve.service.scorer.limits import ScorerLimits
from gnuq_serve.service.scorer.messages import Pong, ScorerState
from gnuq_serve.service.seeing import metrics
from gnuq_serve.service.seeing.logs import answer_observer
from gnuq_serve.service.seeing.observation import NO_CONTEXT, Observation, Observers, RequestContext
from gnuq_serve.service.served import ServedModel, Server, scorer_config
from gnuq_serve.service.settings.model import Settings, SettingsError, load_settings
from gnuq_serve.uncertainty import Uncertainty

logger = logging.getLogger(__name__)

GRAMMAR_WARNING = (
    "a grammar forced tokens: their probability is the plain model's, and is not checked against the engine's"
)


class UncertaintyService:
    """Scores answers in the scorer process; never raises and never takes longer than the deadline."""

    def __init__(self, settings: Settings, reread: Callable[[], Settings] = load_settings) -> None:
        """Nothing is started yet.

        Args:
            settings: the operator's.
            reread: reads them again, where the operator asks for it.

        Raises:
            SettingsError: a calibration or a policy can't be used.
        """
        self.settings = settings
        self.server = Server()
        self.served: ServedModel | None = None
        self.observers = Observers()
        self.observers.append(metrics.observe)
        self.observers.append(answer_observer(logging.getLevelName(settings.log_answers.upper())))
        self.decisions = Decisions.load(settings)
        self.rollout = Rollout(settings, lambda: self.decisions, self._reload)
        self._reread = reread
        self._client: ScorerClient | None = None
        self._store: ResultStore | None = None
        self._background: set[asyncio.Task[Any]] = set()
        self._unfit: set[str] = set()  # ids of calibrations for other weights

    def start(self, served: ServedModel, server: Server | None = None) -> None:
        """Start the scorer process for the model that the server has loaded.

        Args:
            served: what the engine loaded.
            server: what else there is to know of the server.
        """
        settings = self.settings
        self.served = served
        self.server = server or self.server
        if settings.scorer_adapters == 0:
            self.server = msgspec.structs.replace(self.server, adapter_path=nowhere)
        self._store = self._new_store()
        self.rollout.start(self.server.name, self.observers)
        if self.rollout.audits is not None:
            self._in_background(self.rollout.audits.show())
        self._client = ScorerClient(
            scorer_config(settings, served),
            server=self.server.name,
            engine_load=self.server.engine_load if settings.yield_to_engine else None,
            limits=ScorerLimits(
                start=settings.scorer_start_timeout_seconds,
                stuck=settings.stuck_scorer_seconds,
                batch=settings.max_batch_seconds,
            ),
        )
        metrics.QUEUE_LIMIT.set(settings.max_queue)
        metrics.show_scorer_state(self._client.state)
        self._client.start()

    async def stop(self) -> None:
        """End the scorer process; answers that wait for it fail, and are kept as failed."""
        if self._client is not None:
            await self._client.stop()
        if self._background:
            await asyncio.wait(self._background)
        self.rollout.stop()
        if self._store is not None:
            self._store.close()
            self._store = None

    @property
    def state(self) -> ScorerState:
        """How the scorer process is."""
        return ScorerState(status="starting") if self._client is None else self._client.state

    @property
    def load(self) -> Pong:
        """What the scorer last said of its work, for all of the server's processes."""
        return Pong() if self._client is None else self._client.load

    async def score(
        self,
        answers: Sequence[Answer | None],
        options: RequestOptions = DEFAULT_OPTIONS,
        context: RequestContext = NO_CONTEXT,
    ) -> list[dict[str, Any]]:
        """One uncertainty for each answer, in JSON form: scored, skipped or failed, with its reason, or pending.

        Args:
            answers: what to score; None for an answer without token ids.
            options: what the client asked.
            context: where the request came from.
        """
        if (reason := self.rollout.not_now(draw=False)) is not None:
            return self.skip(len(answers), reason, options, context)
        ids = [_new_id() for _ in answers]
        if options.wait:
            deadline = self.settings.deadline_seconds
            results = await asyncio.gather(
                *(
                    self._score_one(answer, options, id_, deadline, context)
                    for answer, id_ in zip(answers, ids, strict=True)
                )
            )
            self._keep_soon(results)
            return results
        return await asyncio.gather(
            *(self._score_later(answer, options, id_, context) for answer, id_ in zip(answers, ids, strict=True))
        )

    def _reload(self) -> list[str]:
        """Read settings and calibrations again; the names of changed settings that want a restart.

        Raises:
            SettingsError: they can't be used; nothing has changed.
        """
        new = self._reread()
        changed = [name for name in Settings.model_fields if getattr(new, name) != getattr(self.settings, name)]
        try:
            settings = Settings.model_validate(
                {**dict(self.settings), **{n: getattr(new, n) for n in RELOADABLE}}
            )
        except ValidationError as error:
            raise SettingsError(f"these want a restart: {', '.join(set(changed) - set(RELOADABLE))}") from error
        self.decisions = Decisions.load(settings)
        self.settings = settings
        self.rollout.change(settings)
        return [name for name in changed if name not in RELOADABLE]

    def skip(
        self,
        answers: int,
        reason: str,
        options: RequestOptions = DEFAULT_OPTIONS,
        context: RequestContext = NO_CONTEXT,
    ) -> list[dict[str, Any]]:
        """As many uncertainties without a score, with the reason."""
        results = [Uncertainty.skipped(reason).replace(id=_new_id()).to_dict() for _ in range(answers)]
        for result in results:
            self._tell(result, None, options, context)
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
        self,
        answer: Answer | None,
        options: RequestOptions,
        result_id: str,
        deadline_seconds: float,
        context: RequestContext,
    ) -> dict[str, Any]:
        start = time.perf_counter()
        if answer is None:
            result = Uncertainty.skipped("the response carries no token ids").replace(id=result_id).to_dict()
            self._tell(result, None, options, context)
            return result
        spans = {"answer": answer.answer_span}
        if options.thinking:
            spans["thinking"] = answer.thinking_span
        semantic = self.decisions.needs_semantic(
            self.decisions.name_for(options.calibration, context.api_key_hash)
        )
        scores = await asyncio.gather(
            *(
                self._score_span(
                    span, options, deadline_seconds, answer.adapter, semantic=semantic and name == "answer"
                )
                for name, span in spans.items()
            )
        )
        by_name = {
            name: score.replace(span=name if score.span else None)
            for name, score in zip(spans, scores, strict=True)
        }
        warnings = answer.warnings + ((GRAMMAR_WARNING,) if answer.grammar else ())
        headline = by_name["answer"]
        pass_seconds = headline.seconds
        if headline.status == "scored":
            headline = headline.replace(warnings=(*headline.warnings, *warnings))
        headline = self._decided(headline.replace(tool_call=answer.tool_call), answer, options, context)
        if context.route != "uncertainty":
            headline = self.rollout.marked(headline)
        result = headline.replace(id=result_id, seconds=time.perf_counter() - start).to_dict()
        if options.thinking:
            result["thinking"] = None if spans["thinking"] is None else by_name["thinking"].to_dict()
        self._tell(result, answer, options, context, pass_seconds)
        return result

    def _decided(
        self, scored: Uncertainty, answer: Answer, options: RequestOptions, context: RequestContext
    ) -> Uncertainty:
        decisions = self.decisions
        name = decisions.name_for(options.calibration, context.api_key_hash)
        if answer.adapter is None:
            self._warn_of_other_weights(decisions.calibrations.get(name or ""), scored)
        try:
            return decisions.decide(
                scored,
                name,
                Answered(
                    prompt_tokens=len(answer.prompt_ids),
                    turns=context.turns,
                    finish_reason=answer.finish_reason,
                    parts=context.parts,
                ),
            )
        except Exception:  # the answer goes out whatever breaks here
            logger.exception("no decision")
            return scored

    def _warn_of_other_weights(self, calibration: Calibration | None, scored: Uncertainty) -> None:
        """Say it loudly, and once: such a calibration decides on no answer at all."""
        if calibration is None or scored.fingerprint is None or calibration.id in self._unfit:
            return
        bound = calibration.fingerprint.get("scorer", scored.fingerprint)
        # The mode is part of the fingerprint, and a request may ask for another.
        if bound != scored.fingerprint and calibration.fingerprint.get("mode", scored.mode) == scored.mode:
            self._unfit.add(calibration.id)
            logger.warning(
                "calibration %s is for the scorer %s, and this one is %s (other weights, or another dtype or "
                "version): no answer gets a p_correct from it. Calibrate this model",
                calibration.id,
                bound,
                scored.fingerprint,
            )

    def _tell(
        self,
        result: dict[str, Any],
        answer: Answer | None,
        options: RequestOptions,
        context: RequestContext,
        pass_seconds: float | None = None,
    ) -> None:
        comparable = self.served is not None and self.served.raw_logprobs
        self.observers.tell(
            Observation.of(result, answer, options, context, comparable=comparable, pass_seconds=pass_seconds)
        )

    async def _score_span(
        self,
        span: Span | None,
        options: RequestOptions,
        deadline_seconds: float,
        adapter: str | None = None,
        *,
        semantic: bool = False,
    ) -> Uncertainty:
        if span is None:
            return Uncertainty.skipped("there is no answer after the thinking")
        tokens, most = len(span.prompt_ids) + len(span.answer_ids), self.settings.max_score_tokens
        if tokens > most:
            return Uncertainty.skipped(f"prompt and answer have {tokens} tokens (max_score_tokens={most})")
        if self._client is None or self.served is None:
            return Uncertainty.failed("the scorer is not started yet")
        allowed, warnings = allowed_options(
            self.settings, options, tokens, len(span.answer_ids), needs_semantic=semantic
        )
        try:
            with metrics.QUEUE.track_inprogress():
                result = await self._client.score(
                    span.prompt_ids, span.answer_ids, deadline_seconds, allowed, adapter
                )
        except (QueueFullError, DeadlineError) as error:
            return Uncertainty.skipped(str(error))
        except ScorerUnavailableError as error:
            return Uncertainty.failed(str(error))
        except Exception as error:  # the answer goes out whatever breaks here
            logger.exception("scoring failed")
            return Uncertainty.failed(f"internal error: {type(error).__name__}")
        if result.status == "scored":
            approximate = self.served.approximate_weights
            warnings += [approximate] if approximate else []
            result = result.replace(warnings=(*result.warnings, *warnings))
        if not self.served.raw_logprobs:
            return result
        dtypes = (self.served.dtype, self.state.dtype or self.served.dtype)
        return check_log_probability(result, span.log_probability, *dtypes)

    async def _score_later(
        self, answer: Answer | None, options: RequestOptions, result_id: str, context: RequestContext
    ) -> dict[str, Any]:
        pending = Uncertainty(status="pending", id=result_id).to_dict()
        deadline = self.settings.background_deadline_seconds
        try:
            if self._store is None:
                raise ResultStoreError("results are not kept: see the server's log")
            # Well after the deadline: a result that is written late must not look lost before.
            await self._store.put(pending, pending_seconds=deadline + 60)
        except ResultStoreError as error:
            result = Uncertainty.failed(str(error)).replace(id=result_id).to_dict()
            self._tell(result, answer, options, context)
            return result

        async def score() -> None:
            await self._keep(await self._score_one(answer, options, result_id, deadline, context))

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
