"""A callback handler that puts the uncertainty of every answer on its message."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, Generation, GenerationChunk, LLMResult

from gnuq_serve.policy import Policy
from gnuq_serve.uncertainty import Uncertainty
from langchain_gnuq.deciding import Context, Decider, turns_of
from langchain_gnuq.errors import OnFailure, UnscoredAnswerError
from langchain_gnuq.registry import RunRegistry, bounded_put

if TYPE_CHECKING:
    from gnuq_serve.calibration import Calibration


@dataclass(slots=True)
class _Run:
    """A model's run that has not ended: what its stream has brought, and what was made of it."""

    context: Context = field(default_factory=Context)
    sent: dict[str, Any] = field(default_factory=dict)
    found: Uncertainty | None = None


class UncertaintyCallbackHandler(BaseCallbackHandler):
    """Writes ``response_metadata["uncertainty"]`` on every answer, with a decision in it where there is one.

    The object is the server's (see `gnuq_serve.uncertainty.Uncertainty`), a plain dict. An answer that
    carries none gets one with status ``skipped``; one that cannot be read, ``failed``. A stream has it on its
    last chunk, and so on the sum of its chunks. Text completions have no message; theirs is in
    ``generation_info["uncertainty"]``. Chains that keep only the text lose the message: ask `uncertainty_of`.

    In ``messages`` streams of LangGraph give the handler in the call's config, not to the model: handlers of the
    model are called after the chunk has gone out.

    Args:
        policy: decides on each scored answer; where its signal is missing, and with None, a decision that is
            already there stays. One policy per model: a second one reads what the first has written.
        on_failure: ``"open"`` lets an answer without a score pass, without a decision; ``"closed"`` raises
            `UnscoredAnswerError` into the call, at the end of a stream. A scored answer passes either way, also
            one that the policy finds no signal on.
        max_remembered: how many runs `uncertainty_of` knows; the oldest is forgotten first.
        calibration: gives ``p_correct``, and a decision, where the server sent neither.

    Raises:
        ValueError: ``on_failure`` is unknown, or ``max_remembered`` is below 1.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        on_failure: OnFailure = "open",
        max_remembered: int = 1000,
        *,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__()
        if on_failure not in get_args(OnFailure):
            raise ValueError(f"on_failure={on_failure!r} is unknown; choose 'open' or 'closed'")
        if max_remembered < 1:
            raise ValueError(f"max_remembered={max_remembered} must be at least 1")
        self.policy = policy
        self.calibration = calibration
        self.on_failure = on_failure
        self.max_remembered = max_remembered
        self.raise_error = on_failure == "closed"
        # Before handlers that run elsewhere in async calls, so that they find the object.
        self.run_inline = True
        self._decider = Decider(calibration, policy)
        self._remembered = RunRegistry(max_remembered)
        # Streams that are left early never end, so this is bounded too.
        self._open: OrderedDict[UUID, _Run] = OrderedDict()
        self._lock = threading.Lock()

    def uncertainty_of(self, run_id: UUID | str) -> Uncertainty | None:
        """The uncertainty of a run, or None for an unknown or forgotten one.

        Args:
            run_id: of a model's run (its first answer), or of a chain around it (the latest answer in it), such
                as ``config={"run_id": …}``. Chains further up than the one that holds the model are known where
                the handler is given in the call's config.

        Raises:
            ValueError: a string that is no run id.
        """
        return self._remembered.get(run_id)

    def on_chain_start(
        self,
        serialized: dict[str, Any],  # noqa: ARG002
        inputs: Any,  # noqa: ARG002
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Remember which chain runs in which."""
        self._remembered.started(run_id, parent_run_id)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        """Forget where the chain ran; not its uncertainty."""
        self._remembered.ended(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        """Forget where the chain ran; not its uncertainty."""
        self._remembered.ended(run_id)

    def on_chat_model_start(
        self,
        serialized: dict[str, Any],  # noqa: ARG002
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Count the user's turns."""
        self._run(run_id).context.turns = turns_of(messages[0] if messages else [])

    def on_llm_new_token(
        self,
        token: str | list[str | dict[str, Any]],  # noqa: ARG002
        *,
        chunk: GenerationChunk | ChatGenerationChunk | None = None,
        run_id: UUID,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Read the score where it passes, and write it on the last chunk."""
        if not isinstance(chunk, ChatGenerationChunk):
            return
        run, message = self._run(run_id), chunk.message
        for metadata in (chunk.generation_info, message.response_metadata):
            if metadata:
                _collect(run, metadata)
        if isinstance(message, AIMessageChunk):
            if message.usage_metadata:
                run.context.prompt_tokens = message.usage_metadata.get("input_tokens")
            if message.chunk_position == "last":
                run.found = self._decider.annotate(run.sent, run.context)
                message.response_metadata["uncertainty"] = run.sent["uncertainty"]

    def on_llm_end(
        self,
        response: LLMResult,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Put the uncertainty on each generation and remember the first.

        Raises:
            UnscoredAnswerError: ``on_failure="closed"`` and an answer has no score.
        """
        with self._lock:
            run = self._open.pop(run_id, None) or _Run()
        found = [
            self._annotate(generation, run, response) for prompt in response.generations for generation in prompt
        ]
        if found:
            self._remembered.remember(run_id, parent_run_id, found[0])
        if self.on_failure == "closed":
            for uncertainty in found:
                if uncertainty.status != "scored":
                    raise UnscoredAnswerError(uncertainty)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        """Forget what the stream has brought."""
        with self._lock:
            self._open.pop(run_id, None)

    def _run(self, run_id: UUID) -> _Run:
        with self._lock:
            run = self._open.get(run_id)
            if run is None:
                run = _Run()
                bounded_put(self._open, run_id, run, self.max_remembered)
            return run

    def _annotate(self, generation: Generation, run: _Run, response: LLMResult) -> Uncertainty:
        metadata = _metadata(generation)
        if run.found is not None:
            # The end of a stream, decided on its last chunk, which `stream` leaves out of what comes here.
            metadata["uncertainty"] = run.sent["uncertainty"]
            return run.found
        context = Context(
            prompt_tokens=_prompt_tokens(generation, response),
            turns=run.context.turns,
            finish_reason=metadata.get("finish_reason"),
        )
        return self._decider.annotate(metadata, context)


def _collect(run: _Run, metadata: dict[str, Any]) -> None:
    run.context.finish_reason = metadata.get("finish_reason") or run.context.finish_reason
    if metadata.get("uncertainty") is not None:
        run.sent["uncertainty"] = metadata["uncertainty"]
    logprobs = metadata.get("logprobs")
    if isinstance(logprobs, dict) and logprobs.get("uncertainty") is not None:
        run.sent["logprobs"] = {"uncertainty": logprobs["uncertainty"]}


def _metadata(generation: Generation) -> dict[str, Any]:
    """Where a generation's metadata lives: on the message of a chat, else in ``generation_info``."""
    if isinstance(generation, ChatGeneration):
        return generation.message.response_metadata
    if generation.generation_info is None:
        generation.generation_info = {}
    return generation.generation_info


def _prompt_tokens(generation: Generation, response: LLMResult) -> int | None:
    if isinstance(generation, ChatGeneration):
        message = generation.message
        usage = message.usage_metadata if isinstance(message, AIMessage) else None
        return usage.get("input_tokens") if usage else None
    # A text completion's usage is that of all prompts of the call.
    usage = (response.llm_output or {}).get("token_usage") if len(response.generations) == 1 else None
    return usage.get("prompt_tokens") if usage else None
