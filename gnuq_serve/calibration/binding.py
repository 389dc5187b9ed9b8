"""What an answer was made with, as named parts of the fingerprint that a calibration is bound to.

`calibrate` reads them off its own settings and a server off each request; both come through here, so that equal
requests give equal parts. Parts are short texts, of prompts and templates a digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

# What vLLM does where a request says nothing, in chats and completions alike.
_NEUTRAL: dict[str, float] = {
    "top_k": 0,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "min_tokens": 0,
}
_ONLY_WITH_TEMPERATURE = ("top_k", "min_p")
_OTHER_SAMPLING = (
    "logit_bias",
    "bad_words",
    "allowed_token_ids",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "use_beam_search",
    "response_format",
    "structured_outputs",
    "thinking_token_budget",
    "repetition_detection",
    "vllm_xargs",
)
_TEMPLATE = (
    "chat_template",
    "chat_template_kwargs",
    "tools",
    "tool_choice",
    "reasoning_effort",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "truncate_prompt_tokens",
)
# As good as saying nothing.
_TEMPLATE_DEFAULTS: dict[str, Any] = {
    "add_generation_prompt": True,
    "continue_final_message": False,
    "add_special_tokens": False,
}
_UNKNOWN = "unknown"
_SYSTEM_ROLES = ("system", "developer")


def sampling_part(request: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> str:
    """How an answer was drawn: temperature, top-p, length limit, and whatever else is not the server's default.

    Args:
        request: fields of a chat or completion request.
        defaults: the server's own (``--generation-config``), for what the request does not say; None: not known.
    """
    temperature = _number(request, defaults, "temperature", 1.0)
    greedy = (
        temperature is not None and temperature < 1e-5
    )  # vLLM's own limit: top-p and the like then do nothing
    top_p = 1.0 if greedy else _number(request, defaults, "top_p", 1.0)
    limit = request.get("max_completion_tokens") or request.get("max_tokens")
    if limit is None:
        limit = _UNKNOWN if defaults is None else defaults.get("max_tokens") or "none"
    parts = [
        f"temperature={_show(0.0 if greedy else temperature)}",
        f"top_p={_show(top_p)}",
        f"max_tokens={limit}",
    ]
    for name, neutral in _NEUTRAL.items():
        if greedy and name in _ONLY_WITH_TEMPERATURE:
            continue
        usual = _number({}, defaults or {}, name, neutral)
        value = _number(request, defaults or {}, name, neutral)
        if value != usual and not (name == "top_k" and {value, usual} == {-1.0, 0.0}):
            parts.append(f"{name}={_show(value)}")
    parts += [f"{name}={_digest(request[name])}" for name in _OTHER_SAMPLING if request.get(name)]
    return " ".join(parts)


def system_part(messages: Iterable[Any]) -> str:
    """Digest of the chat's system prompt, ``none`` without one."""
    texts = [
        _text(message.get("content"))
        for message in messages
        if isinstance(message, Mapping) and message.get("role") in _SYSTEM_ROLES
    ]
    text = "\n".join(texts)
    return hashlib.sha256(text.encode()).hexdigest()[:12] if text else "none"


def template_part(request: Mapping[str, Any]) -> str:
    """Digest of what a chat request changes about how its prompt is written, ``default`` where nothing."""
    changed = {
        name: request[name]
        for name in _TEMPLATE
        if request.get(name) is not None and request[name] != _TEMPLATE_DEFAULTS.get(name, [])
    }
    if not changed.get("tools"):
        changed.pop("tool_choice", None)
    return _digest(changed) if changed else "default"


def chat_parts(request: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> dict[str, str]:
    """The parts of a chat request.

    Args:
        request: its fields; ``messages`` among them.
        defaults: as for `sampling_part`.
    """
    messages = request.get("messages")
    return {
        "sampling": sampling_part(request, defaults),
        "system_prompt": system_part(messages if isinstance(messages, list | tuple) else ()),
        "template": template_part(request),
    }


def completion_parts(request: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> dict[str, str]:
    """The parts of a text completion: no template is applied."""
    limit = {"max_tokens": 16} if request.get("max_tokens") is None else {}  # the API's own default
    return {
        "sampling": sampling_part({**request, **limit}, defaults),
        "system_prompt": "none",
        "template": "no chat",
    }


def _number(
    request: Mapping[str, Any], defaults: Mapping[str, Any] | None, name: str, otherwise: float
) -> float | None:
    """What holds for an answer; None: not known."""
    for holder in (request, defaults or {}):
        try:
            if holder.get(name) is not None:
                return float(holder[name])
        except (TypeError, ValueError):  # vLLM refuses the request
            continue
    return None if defaults is None else otherwise


def _show(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:g}"


def offline_parts(params: Any, chat: Iterable[Any] | None) -> dict[str, str]:
    """The parts of an answer of ``vllm.LLM``.

    Args:
        params: its ``SamplingParams``.
        chat: the messages; None: the prompt was no chat.
    """
    names = ("temperature", "top_p", "max_tokens", *_NEUTRAL, *_OTHER_SAMPLING)
    return {
        "sampling": sampling_part({name: getattr(params, name, None) for name in names}, defaults={}),
        "system_prompt": system_part(chat or ()),
        "template": "no chat" if chat is None else "default",
    }


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _digest(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
