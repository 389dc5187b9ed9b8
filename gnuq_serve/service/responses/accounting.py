"""The answers of one request: their uncertainties, and which of them may go out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.types import Receive

from gnuq_serve.service.answer import Answer
from gnuq_serve.service.hang_up import unless_gone
from gnuq_serve.service.requests.request_plan import RequestPlan
from gnuq_serve.service.responses.gate import Withheld, withheld
from gnuq_serve.service.seeing import metrics
from gnuq_serve.service.seeing.observation import RequestContext
from gnuq_serve.service.service import UncertaintyService


class Accounting:
    """Uncertainties for the answers of one request."""

    def __init__(
        self, service: UncertaintyService, plan: RequestPlan, receive: Receive, context: RequestContext
    ) -> None:
        self.plan = plan
        self.settings = service.settings
        self.thinking_length = service.server.thinking_length
        self.done = False
        self._service = service
        self._receive = receive
        self._context = context
        self._begun: dict[int, asyncio.Task[list[dict[str, Any]]]] = {}
        self._lengths: dict[int, int] = {}

    @property
    def mirror(self) -> bool:
        """The uncertainty goes into ``logprobs`` too."""
        return self.settings.mirror_in_logprobs

    def begin(self, finished: Mapping[int, Answer | None]) -> None:
        """Have choices of a stream scored that have finished while others go on.

        Args:
            finished: their answers by index.
        """
        if self.plan.skip is None:
            for index in finished.keys() - self._begun.keys():
                self._begun[index] = asyncio.ensure_future(self._score([finished[index]]))
                self._lengths[index] = _length(finished[index])

    def end(self) -> None:
        """The request is over: what is still being scored has nobody to go to."""
        for work in self._begun.values():
            work.cancel()

    async def of(
        self, answers: Sequence[Answer | None], indexes: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """One uncertainty for each answer.

        Args:
            answers: of the request's choices.
            indexes: the choices'; those that have begun are not scored again. None: none has.

        Raises:
            ClientGoneError: the client hung up, and scoring was given up.
        """
        if self.plan.skip is not None:
            results = self._service.skip(len(answers), self.plan.skip, self.plan.options, self._context)
        else:
            begun = self._begun and indexes is not None
            work = self._all(answers, indexes or ()) if begun else self._score(answers)
            results = await unless_gone(self._receive, work)
        self.done = True
        return results

    async def _all(self, answers: Sequence[Answer | None], indexes: Sequence[int]) -> list[dict[str, Any]]:
        # A choice that went on after its end was not scored as a whole.
        begun = {
            index: self._begun[index]
            for index, answer in zip(indexes, answers, strict=True)
            if index in self._begun and _length(answer) == self._lengths[index]
        }
        rest = {index: answer for index, answer in zip(indexes, answers, strict=True) if index not in begun}
        works = [begun[index] for index in indexes if index in begun]
        if rest:
            works.append(asyncio.ensure_future(self._score(list(rest.values()))))
        results = iter([result for results in await asyncio.gather(*works) for result in results])
        in_order = {index: next(results) for index in [*(i for i in indexes if i in begun), *rest]}
        return [in_order[index] for index in indexes]

    async def _score(self, answers: Sequence[Answer | None]) -> list[dict[str, Any]]:
        return await self._service.score(answers, self.plan.options, self._context)

    def verdicts(self, results: Sequence[dict[str, Any]]) -> list[Withheld | None]:
        """Why each answer is held back, None for one that may go out; counted."""
        found = [withheld(self.settings, result) for result in results]
        for why in found:
            if why is not None:
                metrics.WITHHELD.labels(self.plan.route, why).inc()
        return found

    def passes_unjudged(self, results: Sequence[dict[str, Any]] | None) -> bool:
        """Whether a response may go out as vLLM made it although something broke on our way.

        Args:
            results: the uncertainties as far as they are known; None: they are not.
        """
        known = [None] if results is None else results
        passes = all(withheld(self.settings, result) is None for result in known)
        if not passes:
            metrics.WITHHELD.labels(self.plan.route, "unscored").inc()
        return passes


def _length(answer: Answer | None) -> int:
    return 0 if answer is None else len(answer.answer_ids)
