"""Answers from a server with uncertainty on its answers, several questions at a time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gnuq_serve.calibration.answers import AnswerError, OnAnswer, Sampling
from gnuq_serve.calibration.questions import Question
from gnuq_serve.calibration.workers import run_workers
from gnuq_serve.calibration.working_file import Answer
from gnuq_serve.uncertainty import Uncertainty

# What of --request changes how a given answer's prompt is written.
_TEMPLATE_FIELDS = ("tools", "chat_template", "chat_template_kwargs")


class ServerSource:
    """A server with uncertainty on its answers, asked through the ``openai`` client."""

    def __init__(
        self,
        url: str,
        *,
        sampling: Sampling,
        model: str | None = None,
        api_key: str | None = None,
        options: Mapping[str, Any] | None = None,
        request: Mapping[str, Any] | None = None,
        concurrency: int = 8,
    ) -> None:
        """Connect to a server.

        Args:
            url: its address, with or without ``/v1``.
            sampling: how it is to answer.
            model: its name for the model; the only one that it serves by default.
            api_key: its key; ``OPENAI_API_KEY`` of the environment by default.
            options: options of the request's ``uncertainty`` object.
            request: further fields of the request.
            concurrency: most questions under way at a time.

        Raises:
            AnswerError: no answer from there, or several models and none named.
            ImportError: ``openai`` is not installed.
        """
        import openai

        self._openai = openai
        self._connection = connection(url, api_key)
        self._sampling, self._options, self._request = sampling, dict(options or {}), dict(request or {})
        self._concurrency = concurrency
        self._url = self._connection["base_url"]
        self.model = model or only_model(self._connection)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Model, sampling and options; not the address, which may change from day to day."""
        return {
            "model": self.model,
            **asdict(self._sampling),
            "uncertainty": self._options,
            "request": self._request,
        }

    def answer(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        """See `AnswerSource.answer`."""
        asyncio.run(self._answer_all(questions, on_answer))

    def close(self) -> None:
        """Nothing to free: connections live as long as `answer`."""

    async def _answer_all(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        waiting = iter(questions)
        refused = answered = 0

        async def work() -> None:
            nonlocal refused, answered
            for question in waiting:
                answer = await self._one(client, question)
                answered, refused = answered + (answer.failure is None), refused + (answer.failure is not None)
                on_answer(answer)
                if not answered and refused >= 5:
                    raise AnswerError(f"{self._url} refuses every question: {answer.failure}")

        async with self._openai.AsyncOpenAI(**self._connection) as client:
            await run_workers(work, min(self._concurrency, len(questions)))

    async def _one(self, client: Any, question: Question) -> Answer:
        try:
            if question.answer is not None:
                return await self._score(client, question, question.answer)
            return await self._ask(client, question)
        except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
            return Answer(key=question.key, failure=str(error)[:500])
        except self._openai.OpenAIError as error:
            raise gone(self._url, error) from error

    async def _ask(self, client: Any, question: Question) -> Answer:
        completion = await client.chat.completions.create(
            model=self.model,
            messages=list(question.messages),
            **asdict(self._sampling),
            extra_body={**self._request, "uncertainty": {"wait": True, **self._options}},
        )
        choice = completion.choices[0]
        score = (choice.model_extra or {}).get("uncertainty")
        if score is None:
            raise AnswerError(
                f"answers of {self._url} carry no `uncertainty`: start it with `gnuq-serve serve`, and with "
                "scoring on"
            )
        if score.get("withheld"):
            raise AnswerError(
                f"{self._url} holds answers back, and shows none of them: calibrate with on_uncertain: pass and "
                "on_failure: open"
            )
        return Answer(
            key=question.key,
            text=choice.message.content or "",
            uncertainty=Uncertainty.from_dict(score),
            finish_reason=choice.finish_reason,
            prompt_tokens=completion.usage.prompt_tokens if completion.usage else None,
        )

    async def _score(self, client: Any, question: Question, answer: str) -> Answer:
        template = {name: self._request[name] for name in _TEMPLATE_FIELDS if name in self._request}
        body = {
            "model": self.model,
            "messages": list(question.messages),
            "answer": answer,
            "uncertainty": {"wait": True, **self._options},
            **template,
        }
        try:
            score = await client.post("/uncertainty", body=body, cast_to=object)
        except self._openai.APIStatusError as error:
            if error.status_code not in (404, 405):
                raise
            raise AnswerError(
                f"{self._url} has no route that scores a given answer (POST /v1/uncertainty); use --model"
            ) from error
        return Answer(
            key=question.key,
            text=answer,
            uncertainty=Uncertainty.from_dict(score),
        )


def connection(url: str, api_key: str | None) -> dict[str, Any]:
    """Arguments of an ``openai`` client of a server; the default key is ``OPENAI_API_KEY`` of the environment."""
    return {
        "base_url": url.rstrip("/").removesuffix("/v1") + "/v1",
        "api_key": api_key or os.environ.get("OPENAI_API_KEY") or "none",
        "max_retries": 6,  # the client waits longer each time, 8 s at most
    }


def only_model(connection: Mapping[str, Any]) -> str:
    """The name of the one model that a server has.

    Raises:
        AnswerError: no answer from there, or none or several models.
    """
    import openai

    url = connection["base_url"]
    with openai.OpenAI(**{**connection, "max_retries": 1}) as client:
        try:
            models = [model.id for model in client.models.list()]
        except openai.OpenAIError as error:
            raise gone(url, error) from error
    if len(models) != 1:
        raise AnswerError(f"{url} serves {', '.join(models) or 'nothing'}; name one with --served-model")
    return models[0]


def gone(url: str, error: Exception) -> AnswerError:
    """The error of a server that can't be asked any more."""
    status = getattr(error, "status_code", None)
    hint = {401: "set OPENAI_API_KEY or --api-key", 403: "this key may not ask", 404: "check --server"}.get(
        status or 0, "is the server up? Run the same command again to go on"
    )
    return AnswerError(f"{url}: {str(error) or type(error).__name__}; {hint}"[:600])
