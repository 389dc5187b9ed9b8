"""What a client asked, and what vLLM is asked instead so that the answer can be scored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Route = Literal["chat", "completion"]

ROUTES: dict[str, Route] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}

_FIELD = "uncertainty"
_MEDIA_PARTS = (
    "image_url",
    "image_embeds",
    "image_pil",
    "audio_url",
    "input_audio",
    "audio_embeds",
    "video_url",
)


class InvalidRequestError(ValueError):
    """The request's ``uncertainty`` field is wrong; the message says how and what is right."""


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """How to answer one request.

    Attributes:
        route: which API.
        body: the request as vLLM gets it.
        unscored: why the response passes untouched; None: its choices get an ``uncertainty``.
        skip: why its choices are not sent to the scorer; None: they are.
        keep_token_ids: the client asked for token ids itself.
        keep_logprobs: the client asked for logprobs itself.
        comparable: vLLM's logprobs are those of the plain model, so that the scorer's can be checked with them.
    """

    route: Route
    body: Mapping[str, Any]
    unscored: Literal["off", "stream"] | None = None
    skip: str | None = None
    keep_token_ids: bool = False
    keep_logprobs: bool = False
    comparable: bool = False


def plan_request(route: Route, request: Mapping[str, Any], adapters: Collection[str] = ()) -> RequestPlan:
    """Read our field off the request and ask vLLM for token ids and logprobs.

    Args:
        route: which API.
        request: the request's JSON object.
        adapters: names of LoRA adapters that the server knows.

    Raises:
        InvalidRequestError: the field ``uncertainty`` is neither a boolean nor an object of known options.
    """
    body = {name: value for name, value in request.items() if name != _FIELD}
    if not _wanted(request.get(_FIELD)):
        return RequestPlan(route, body, unscored="off")
    if request.get("stream"):
        return RequestPlan(route, body, unscored="stream")
    if (reason := _skip_reason(route, request, adapters)) is not None:
        return RequestPlan(route, body, skip=reason, keep_token_ids=True, keep_logprobs=True)
    logprobs = request.get("logprobs")
    keep_logprobs = logprobs is not None and logprobs is not False  # completions: 0 is a wish
    # Either of these without logprobs is an error: vLLM's to report.
    adds_logprobs = not keep_logprobs and not (request.get("top_logprobs") or request.get("logprob_token_ids"))
    body["return_token_ids"] = True
    if adds_logprobs:
        body["logprobs"] = True if route == "chat" else 0
    return RequestPlan(
        route,
        body,
        keep_token_ids=bool(request.get("return_token_ids")),
        keep_logprobs=keep_logprobs,
        comparable=(keep_logprobs or adds_logprobs) and not _grammar_forces_tokens(request),
    )


def _wanted(field: Any) -> bool:
    if field is None or isinstance(field, bool):
        return field is not False
    if not isinstance(field, Mapping):
        raise InvalidRequestError(f"uncertainty must be true, false or an object of options, not {field!r:.80}")
    for option, value in field.items():
        allowed = {"mode": ("exact",), "trace": (False,), "semantic": (False,), "wait": (True,)}.get(option)
        if allowed is None:
            raise InvalidRequestError(f"uncertainty.{option} is unknown; options: mode, trace, semantic, wait")
        if value not in allowed:
            raise InvalidRequestError(f"uncertainty.{option}={value!r:.80} is not supported; use {allowed[0]!r}")
    return True


def _skip_reason(route: Route, request: Mapping[str, Any], adapters: Collection[str]) -> str | None:
    if isinstance(model := request.get("model"), str) and model in adapters:
        return "adapter not loaded: the scorer has the base model only"
    if request.get("echo"):
        return "echo is not scored"  # asking for token ids takes the prompt out of the echoed text
    if request.get("include_reasoning") is False:
        return "include_reasoning=false withholds the token ids"
    if request.get("prompt_embeds"):
        return "prompt_embeds have no token ids"
    if route == "chat" and _has_media(request.get("messages")):
        return "image, audio or video in the prompt"
    return None


def _has_media(messages: Any) -> bool:
    contents = (
        [m.get("content") for m in messages if isinstance(m, Mapping)] if isinstance(messages, list) else []
    )
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, Mapping) and (part.get("type") in _MEDIA_PARTS) for part in parts)


def _grammar_forces_tokens(request: Mapping[str, Any]) -> bool:
    # vLLM's logprobs are then taken after the grammar's mask.
    response_format = request.get("response_format")
    if isinstance(response_format, Mapping) and response_format.get("type") not in (None, "text"):
        return True
    choice = request.get("tool_choice")
    return bool(request.get("structured_outputs")) or choice == "required" or isinstance(choice, Mapping)
