"""`ChatGnuq`: LangChain's OpenAI chat model, reading the uncertainty of a gnuq-serve server."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast
from uuid import UUID

import openai
from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    BaseCallbackManager,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.utils import from_env, secret_from_env
from langchain_openai import ChatOpenAI
from pydantic import Field, InstanceOf, PrivateAttr, SecretStr, field_validator, model_validator

from gnuq_serve.policy import Policy
from gnuq_serve.uncertainty import Uncertainty
from langchain_gnuq.callback import UncertaintyCallbackHandler
from langchain_gnuq.deciding import Context, Decider, turns_of
from langchain_gnuq.errors import OnFailure
from langchain_gnuq.score_chunk import EndOfStream, take_score
from langchain_gnuq.version import __version__

if TYPE_CHECKING:
    from gnuq_serve.calibration import Calibration
else:
    Calibration = Any  # its module brings numpy, and is imported where one is given


class ChatGnuq(ChatOpenAI):
    """A chat model behind a gnuq-serve server; every answer carries its uncertainty.

    It is `langchain_openai.ChatOpenAI` with other defaults: the address is taken from ``GNUQ_BASE_URL`` (else
    ``http://127.0.0.1:8000/v1``), the key from ``GNUQ_API_KEY`` (else ``EMPTY``; never OpenAI's), streams carry
    usage, and the route is that of chat completions, which is scored.

    ``response_metadata["uncertainty"]`` is the server's object (see `gnuq_serve.uncertainty.Uncertainty`), a
    plain dict, with what ``calibration`` and ``policy`` add. It is written before any callback sees the message:
    on the message of a call, and on the last chunk of a stream and no other. An answer that carries none has
    status ``skipped``. Where an output parser drops the message, ask `uncertainty_of`.

    Example:
        ```python
        from langchain_gnuq import ChatGnuq

        model = ChatGnuq(model="MODEL", uncertainty={"mode": "answer_only"})
        model.invoke("What is the capital of France?").response_metadata["uncertainty"]["log_grad_norm_sq"]
        ```

    Raises:
        UnscoredAnswerError: in a call, at the end of a stream; an answer has no score and
            ``on_failure="closed"``.
    """

    openai_api_key: SecretStr | None = Field(
        alias="api_key", default_factory=secret_from_env("GNUQ_API_KEY", default="EMPTY")
    )
    openai_api_base: str | None = Field(
        alias="base_url", default_factory=from_env("GNUQ_BASE_URL", default="http://127.0.0.1:8000/v1")
    )
    stream_usage: bool | None = True
    use_responses_api: bool | None = False

    uncertainty: bool | dict[str, Any] | None = None
    """How answers are scored, such as ``{"mode": "answer_only", "trace": True}``; False: not at all; None: as the
    server does. For one call: ``model.invoke(…, uncertainty=…)``, or ``model.bind(uncertainty=…)``."""

    policy: InstanceOf[Policy] | None = None
    """Decides on each scored answer; also given as its fields in a dict."""

    calibration: Calibration | str | None = None
    """Gives ``p_correct`` and a decision where the server sent neither; also given as the path of its file (only
    then a serialised model can be loaded again)."""

    on_failure: OnFailure = "open"
    """``"open"`` lets an answer without a score pass, ``"closed"`` raises `UnscoredAnswerError`."""

    max_remembered: int = Field(default=1000, ge=1)
    """How many runs `uncertainty_of` knows."""

    _loaded: Calibration | None = PrivateAttr(default=None)
    _handler: UncertaintyCallbackHandler = PrivateAttr()

    @field_validator("policy", mode="before")
    @classmethod
    def _read_policy(cls, value: Any) -> Any:
        return Policy.from_dict(value) if isinstance(value, Mapping) else value

    @field_validator("calibration", mode="before")
    @classmethod
    def _read_calibration(cls, value: Any) -> Any:
        if value is None or isinstance(value, str | Path):
            return None if value is None else str(value)
        from gnuq_serve.calibration import Calibration

        if not isinstance(value, Calibration):
            raise ValueError(f"a Calibration, or the path of its file, is expected, not {type(value).__name__}")
        return value

    @model_validator(mode="after")
    def _set_gnuq_version(self) -> Self:
        self._add_version("langchain-gnuq", __version__)
        return self

    @model_validator(mode="after")
    def _set_gnuq_parts(self) -> Self:
        if isinstance(self.calibration, str):
            from gnuq_serve.calibration import Calibration

            self._loaded = Calibration.load(self.calibration)
        else:
            self._loaded = self.calibration
        self._handler = UncertaintyCallbackHandler(on_failure=self.on_failure, max_remembered=self.max_remembered)
        if isinstance(self.callbacks, BaseCallbackManager):
            self.callbacks = self.callbacks.copy()
            self.callbacks.add_handler(self._handler, inherit=False)
        else:
            self.callbacks = [*(self.callbacks or []), self._handler]
        return self

    def uncertainty_of(self, run_id: UUID | str) -> Uncertainty | None:
        """The uncertainty of a run, or None for an unknown or forgotten one.

        Args:
            run_id: of this model's run, or of the chain that holds it, such as ``config={"run_id": …}`` of
                ``model.with_structured_output(…)`` or ``prompt | model | parser`` (the latest answer in it).

        Raises:
            ValueError: a string that is no run id.
        """
        return self._handler.uncertainty_of(run_id)

    @property
    def _decider(self) -> Decider:
        return Decider(self._loaded, self.policy)

    @property
    def _llm_type(self) -> str:
        return "chat-gnuq"

    @property
    def lc_secrets(self) -> dict[str, str]:
        """Which environment variable holds which secret."""
        return {"openai_api_key": "GNUQ_API_KEY"}

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where the class is found when a serialised model is loaded."""
        return ["langchain_gnuq", "chat_models"]

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """What a serialised model holds in another form than the model."""
        policy = None if self.policy is None else dataclasses.asdict(self.policy)
        return {**super().lc_attributes, **({} if policy is None else {"policy": policy})}

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """The serialised model; its key is read from ``GNUQ_API_KEY`` when it is loaded, never OpenAI's."""
        data = super().to_json()
        if data["type"] == "constructor":
            # The bases' `lc_secrets` are merged last.
            data["kwargs"]["openai_api_key"] = {"lc": 1, "type": "secret", "id": ["GNUQ_API_KEY"]}
        return data

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "gnuq"
        return params

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        of_call = kwargs.pop("uncertainty", None)
        payload = super()._get_request_payload(input_, stop=stop, **kwargs)
        body = dict(payload.get("extra_body") or {})
        if of_call is not None:
            body["uncertainty"] = of_call
        elif self.uncertainty is not None:
            body.setdefault("uncertainty", self.uncertainty)
        if body:
            payload["extra_body"] = body
        return payload

    def _create_chat_result(
        self, response: dict[str, Any] | openai.BaseModel, generation_info: dict[str, Any] | None = None
    ) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        choices = response["choices"] if isinstance(response, dict) else response.choices  # type: ignore[attr-defined]
        for generation, choice in zip(result.generations, choices, strict=True):
            own = choice.get("uncertainty") if isinstance(choice, dict) else getattr(choice, "uncertainty", None)
            take_score(generation, own)
        return result

    def _convert_chunk_to_generation_chunk(
        self,
        chunk: dict[str, Any],
        default_chunk_class: type,
        base_generation_info: dict[str, Any] | None,
    ) -> ChatGenerationChunk | None:
        generation = super()._convert_chunk_to_generation_chunk(chunk, default_chunk_class, base_generation_info)
        # Streams of structured output carry the server's chunk in one of the client's events.
        choices = chunk.get("choices") or chunk.get("chunk", {}).get("choices")
        if generation is not None and choices:
            take_score(generation, choices[0].get("uncertainty"))
        return generation

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        result = super()._generate(messages, stop=stop, run_manager=run_manager, **kwargs)
        return self._decided(result, messages)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        result = await super()._agenerate(messages, stop=stop, run_manager=run_manager, **kwargs)
        return self._decided(result, messages)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        end = EndOfStream(messages, self._decider)
        for chunk in super()._stream(messages, stop=stop, run_manager=run_manager, **kwargs):
            if end.passes(chunk):
                yield chunk
        if (last := end.chunk()) is not None:
            if run_manager:
                run_manager.on_llm_new_token("", chunk=last)
            yield last

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        end = EndOfStream(messages, self._decider)
        stream = super()._astream(messages, stop=stop, run_manager=run_manager, **kwargs)
        async with aclosing(cast("AsyncGenerator[ChatGenerationChunk]", stream)) as chunks:
            async for chunk in chunks:
                if end.passes(chunk):
                    yield chunk
        if (last := end.chunk()) is not None:
            if run_manager:
                await run_manager.on_llm_new_token("", chunk=last)
            yield last

    def _decided(self, result: ChatResult, messages: list[BaseMessage]) -> ChatResult:
        decider = self._decider
        for generation in result.generations:
            usage = generation.message.usage_metadata if isinstance(generation.message, AIMessage) else None
            context = Context(
                prompt_tokens=usage.get("input_tokens") if usage else None,
                turns=turns_of(messages),
                finish_reason=(generation.generation_info or {}).get("finish_reason"),
            )
            decider.annotate(generation.message.response_metadata, context)
        return result
