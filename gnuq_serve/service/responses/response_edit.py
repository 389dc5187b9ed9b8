"""Reading the answers out of vLLM's response, and putting the uncertainties in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gnuq_serve.service.answer import Answer, ThinkingLength
from gnuq_serve.service.requests.request_plan import RequestPlan
from gnuq_serve.service.responses.choice_record import ChoiceRecord


def read_answers(
    plan: RequestPlan, response: Mapping[str, Any], thinking_length: ThinkingLength | None = None
) -> list[Answer | None]:
    """The answers of a response, one for each choice; None where vLLM gave no token ids."""
    answers = []
    for choice in response["choices"]:
        record = ChoiceRecord(plan)
        record.add_prompt(response)
        record.add(choice)
        answers.append(record.answer(thinking_length))
    return answers


def attach(
    plan: RequestPlan, response: dict[str, Any], uncertainties: Sequence[Mapping[str, Any]], *, mirror: bool
) -> None:
    """Give each choice its uncertainty and take out what only we had asked for. Edits ``response``.

    Args:
        plan: the request's plan.
        response: vLLM's response.
        uncertainties: one for each choice, in JSON form.
        mirror: also put it into the choice's ``logprobs``, where OpenAI clients keep unknown keys.
    """
    restore(plan, response)
    for choice, uncertainty in zip(response["choices"], uncertainties, strict=True):
        if plan.echoed:
            choice["text"] = plan.echo_of(choice["index"]) + choice["text"]
        message = choice.get("message")
        if plan.hide_reasoning and isinstance(message, dict):
            message["reasoning"] = None
        tool_call = isinstance(message, Mapping) and bool(message.get("tool_calls"))
        add_uncertainty(plan, choice, uncertainty, tool_call=tool_call, mirror=mirror)


def restore(plan: RequestPlan, response: dict[str, Any], *, keep_prompt_ids: bool = False) -> None:
    """Take token ids and logprobs that only we had asked for out of a response or a chunk. Edits it.

    Args:
        plan: the request's plan.
        response: vLLM's response or chunk.
        keep_prompt_ids: vLLM sends those of the prompt unasked.
    """
    keep_prompt_ids |= plan.keep_token_ids
    if not keep_prompt_ids:
        _blank(response, "prompt_token_ids")
    for choice in response["choices"]:
        if not keep_prompt_ids:
            _blank(choice, "prompt_token_ids")
        if not plan.keep_token_ids or plan.hide_reasoning:
            _blank(choice, "token_ids")
        if not plan.keep_logprobs or plan.hide_reasoning:
            _blank(choice, "logprobs")


def add_uncertainty(
    plan: RequestPlan,
    choice: dict[str, Any],
    uncertainty: Mapping[str, Any],
    *,
    tool_call: bool,
    mirror: bool,
) -> None:
    """Put an uncertainty on a choice, and where ``mirror`` is set into its ``logprobs``. Edits ``choice``."""
    uncertainty = {**uncertainty, "tool_call": tool_call}
    choice["uncertainty"] = uncertainty
    if mirror:
        empty = {"content": None} if plan.route == "chat" else {"tokens": None, "token_logprobs": None}
        choice["logprobs"] = {**(choice.get("logprobs") or empty), "uncertainty": uncertainty}


def _blank(holder: dict[str, Any], name: str) -> None:
    if name in holder:
        holder[name] = None
