"""Reading the answers out of vLLM's response, and putting the uncertainties in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gnuq_serve.service.request_plan import RequestPlan
from gnuq_serve.uncertainty import Uncertainty


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice of a response, as token ids.

    Attributes:
        prompt_ids: what the model read.
        answer_ids: what it wrote, end-of-turn token included.
        log_probability: the engine's ``l`` of the answer; None where it can't be compared.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    log_probability: float | None


def read_answers(plan: RequestPlan, response: Mapping[str, Any]) -> list[Answer | None]:
    """The answers of a response, one for each choice; None where vLLM gave no token ids."""
    answers: list[Answer | None] = []
    for choice in response["choices"]:
        prompt_ids = choice.get("prompt_token_ids") or response.get("prompt_token_ids")
        answer_ids = choice.get("token_ids")
        if prompt_ids is None or answer_ids is None:
            answers.append(None)
            continue
        logprobs = _token_logprobs(choice.get("logprobs")) if plan.comparable else None
        same_tokens = logprobs is not None and len(logprobs) == len(answer_ids)
        answers.append(Answer(prompt_ids, answer_ids, math.fsum(logprobs) if logprobs and same_tokens else None))
    return answers


def attach(
    plan: RequestPlan, response: dict[str, Any], uncertainties: Sequence[Uncertainty], *, mirror: bool
) -> None:
    """Give each choice its uncertainty and take out what only we had asked for. Edits ``response``.

    Args:
        plan: the request's plan.
        response: vLLM's response.
        uncertainties: one for each choice.
        mirror: also put it into the choice's ``logprobs``, where OpenAI clients keep unknown keys.
    """
    if not plan.keep_token_ids:
        _blank(response, "prompt_token_ids")
    for choice, uncertainty in zip(response["choices"], uncertainties, strict=True):
        if not plan.keep_token_ids:
            _blank(choice, "prompt_token_ids")
            _blank(choice, "token_ids")
        if not plan.keep_logprobs:
            choice["logprobs"] = None
        message = choice.get("message")
        if isinstance(message, Mapping) and message.get("tool_calls"):
            uncertainty = uncertainty.replace(tool_call=True)
        choice["uncertainty"] = uncertainty.to_dict()
        if mirror:
            empty = {"content": None} if plan.route == "chat" else {"tokens": None, "token_logprobs": None}
            choice["logprobs"] = {**(choice.get("logprobs") or empty), "uncertainty": choice["uncertainty"]}


def _token_logprobs(logprobs: Mapping[str, Any] | None) -> list[float] | None:
    if not logprobs:
        return None
    if (content := logprobs.get("content")) is not None:  # chat
        return [token["logprob"] for token in content]
    values: list[float] | None = logprobs.get("token_logprobs")  # completions
    return values


def _blank(holder: dict[str, Any], name: str) -> None:
    if name in holder:
        holder[name] = None
