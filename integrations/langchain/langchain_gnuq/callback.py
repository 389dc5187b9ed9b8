"""A callback handler that puts the uncertainty of every answer on its message."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal, get_args
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.outputs import ChatGeneration, Generation, LLMResult

from gnuq_serve.policy import Policy
from gnuq_serve.uncertainty import Uncertainty

OnFailure = Literal["open", "closed"]

_ABSENT = "the response carries no uncertainty: not a gnuq-serve server, or switched off"


class UnscoredAnswerError(RuntimeError):
    """An answer without a score, where ``on_failure="closed"`` asks for one.

    Attributes:
        uncertainty: the object of that answer, with its ``status`` and ``reason``.
    """

    def __init__(self, uncertainty: Uncertainty) -> None:
        self.uncertainty = uncertainty
        super().__init__(
            f"the answer was not scored: {uncertainty.status} ({uncertainty.reason or 'no reason given'}). "
            "Ask a gnuq-serve server, without `uncertainty: false`, "
            'or let unscored answers pass with on_failure="open"'
        )


class UncertaintyCallbackHandler(BaseCallbackHandler):
    """Writes ``response_metadata["uncertainty"]`` on every answer, with the policy's decision in it.

    The object is the server's (see `gnuq_serve.uncertainty.Uncertainty`), a plain dict. An answer that
    carries none gets one with status ``skipped``; one that cannot be read, ``failed``. Text completions have
    no message; theirs is in ``generation_info["uncertainty"]``. Chains that keep only the text lose the
    message: ask `uncertainty_of`. So do callers of ``stream``: a streamed answer's chunks are out before the
    handler is called.

    Args:
        policy: decides on each scored answer; where its signal is missing, and with None, a decision that is
            already there stays. One policy per model: a second one reads what the first has written.
        on_failure: ``"open"`` lets an answer without a score pass, without a decision; ``"closed"`` raises
            `UnscoredAnswerError` into the call. A scored answer passes either way, also one that
            the policy finds no signal on.
        max_remembered: how many runs `uncertainty_of` knows; the oldest is forgotten first.

    Raises:
        ValueError: ``on_failure`` is unknown, or ``max_remembered`` is below 1.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        on_failure: OnFailure = "open",
        max_remembered: int = 1000,
    ) -> None:
        super().__init__()
        if on_failure not in get_args(OnFailure):
            raise ValueError(f"on_failure={on_failure!r} is unknown; choose 'open' or 'closed'")
        if max_remembered < 1:
            raise ValueError(f"max_remembered={max_remembered} must be at least 1")
        self.policy = policy
        self.on_failure = on_failure
        self.max_remembered = max_remembered
        self.raise_error = on_failure == "closed"
        # Before handlers that run elsewhere in async calls, so that they find the object.
        self.run_inline = True
        self._remembered: OrderedDict[UUID, Uncertainty] = OrderedDict()
        self._lock = threading.Lock()

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        """Put the uncertainty on each generation and remember the first.

        Raises:
            UnscoredAnswerError: ``on_failure="closed"`` and an answer has no score.
        """
        found = [self._annotate(generation) for prompt in response.generations for generation in prompt]
        if found:
            with self._lock:
                self._remembered[run_id] = found[0]
                while len(self._remembered) > self.max_remembered:
                    self._remembered.popitem(last=False)
        if self.on_failure == "closed":
            for uncertainty in found:
                if uncertainty.status != "scored":
                    raise UnscoredAnswerError(uncertainty)

    def uncertainty_of(self, run_id: UUID) -> Uncertainty | None:
        """The uncertainty of a model run's first answer, or None for an unknown or forgotten run."""
        with self._lock:
            return self._remembered.get(run_id)

    def _annotate(self, generation: Generation) -> Uncertainty:
        metadata = _metadata(generation)
        uncertainty = self._read(metadata)
        metadata["uncertainty"] = uncertainty.to_dict()
        return uncertainty

    def _read(self, metadata: Mapping[str, Any]) -> Uncertainty:
        # Already there: a cache hit, or a second handler.
        data = metadata.get("uncertainty")
        if data is None:
            logprobs = metadata.get("logprobs")
            data = logprobs.get("uncertainty") if isinstance(logprobs, Mapping) else None
        if data is None:
            return Uncertainty.skipped(_ABSENT)
        if not isinstance(data, Mapping):
            return Uncertainty.failed(f"the uncertainty object is malformed: {data!r:.80} is no object")
        try:
            uncertainty = Uncertainty.from_dict(data)
            return uncertainty if self.policy is None else self.policy.apply(uncertainty)
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            return Uncertainty.failed(f"the uncertainty object is malformed: {error}")


def _metadata(generation: Generation) -> dict[str, Any]:
    """Where a generation's metadata lives: on the message of a chat, else in ``generation_info``."""
    if isinstance(generation, ChatGeneration):
        return generation.message.response_metadata
    if generation.generation_info is None:
        generation.generation_info = {}
    return generation.generation_info
