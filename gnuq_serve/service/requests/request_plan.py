"""What a client asked, and what vLLM is asked instead so that the answer can be scored."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from gnuq_serve.uncertainty import Mode

Route = Literal["chat", "completion"]
# Name of a LoRA adapter -> where it is; None where the scorer can't load it.
AdapterPath = Callable[[str], "str | None"]

ADAPTER_NOT_LOADED = "adapter not loaded: the scorer has the base model only"

ROUTES: dict[str, Route] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}

_FIELD = "uncertainty"
_CALIBRATION = "calibration"
_MEDIA_PARTS = (
    "image_url",
    "image_embeds",
    "image_pil",
    "audio_url",
    "input_audio",
    "audio_embeds",
    "video_url",
)
# Option of the request's field -> the values it may have; the first is the default.
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "mode": (None, "exact", "answer_only"),
    "trace": (False, True),
    "semantic": (False, True),
    "thinking": (False, True),
    "wait": (True, False),
}


def nowhere(_name: str) -> str | None:
    """The scorer can load no adapter."""
    return None


class InvalidRequestError(ValueError):
    """The request's ``uncertainty`` field is wrong; the message says how and what is right."""


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What the client asked of the score.

    Attributes:
        wait: hold the end of the response until the score is there; else it is ``pending``.
        thinking: score the thinking of a reasoning model too, apart from its answer.
        mode: ``exact`` or ``answer_only``; None: the operator's.
        trace: each answer token by itself too.
        semantic: SemGrad and its relatives too.
        calibration: which of the operator's makes the decision; None: the one of the API key, or the default.
    """

    wait: bool = True
    thinking: bool = False
    mode: Mode | None = None
    trace: bool = False
    semantic: bool = False
    calibration: str | None = None


DEFAULT_OPTIONS = RequestOptions()


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """How to answer one request.

    Attributes:
        route: which API.
        body: the request as vLLM gets it.
        unscored: why the response passes untouched; None: its choices get an ``uncertainty``.
        skip: why its choices are not sent to the scorer; None: they are.
        options: what the client asked of the score.
        keep_token_ids: the client asked for token ids itself.
        keep_logprobs: the client asked for logprobs itself.
        comparable: vLLM's logprobs are those of the plain model, so that the scorer's can be checked with them.
        grammar: a grammar forces some of the answer's tokens.
        hide_reasoning: the client wants no thinking; vLLM is asked for it, since it withholds the token ids too.
        echo: the response repeats the prompt, and the logprobs are those of prompt and answer.
        echoed: prompts that vLLM leaves out of the echoed text when it is asked for token ids, one for each
            ``choices_per_prompt`` choices; empty: nothing to put back.
        choices_per_prompt: the request's ``n``.
        template_options: what the request hands to the chat template; some reasoning parsers read it.
        keep_text: question and answer are wanted as text, for the operator's log.
        adapter: where the LoRA adapter is that answers; None: the base model does.
    """

    route: Route
    body: Mapping[str, Any]
    unscored: Literal["off"] | None = None
    skip: str | None = None
    options: RequestOptions = DEFAULT_OPTIONS
    keep_token_ids: bool = False
    keep_logprobs: bool = False
    comparable: bool = False
    grammar: bool = False
    hide_reasoning: bool = False
    echo: bool = False
    echoed: tuple[str, ...] = ()
    choices_per_prompt: int = 1
    template_options: Mapping[str, Any] = field(default_factory=dict)
    keep_text: bool = False
    adapter: str | None = None

    def question_of(self, index: int) -> str | Sequence[Mapping[str, Any]] | None:
        """What a choice answers; None where it is no text."""
        if self.route == "chat":
            messages = self.body.get("messages")
            return messages if isinstance(messages, list) else None
        prompt, prompts = index // self.choices_per_prompt, _texts(self.body.get("prompt"))
        return prompts[prompt] if prompt < len(prompts) else None

    def echo_of(self, index: int) -> str:
        """The prompt that belongs in front of a choice's text."""
        prompt = index // self.choices_per_prompt
        return self.echoed[prompt] if prompt < len(self.echoed) else ""


def plan_request(
    route: Route,
    request: Mapping[str, Any],
    adapters: Container[str] = (),
    *,
    parses: bool | None = True,
    not_now: str | None = None,
    keep_text: bool = False,
    by_default: bool = True,
    adapter_path: AdapterPath = nowhere,
) -> RequestPlan:
    """Read our field off the request and ask vLLM for token ids and logprobs.

    Args:
        route: which API.
        request: the request's JSON object.
        adapters: names of LoRA adapters that the server knows.
        parses: the server takes answers apart with a tool or reasoning parser; None: not known.
        not_now: why the operator wants no score of this request; None: it may be scored.
        keep_text: the operator's log takes question and answer as text.
        by_default: a request without our field wants a score.
        adapter_path: where an adapter is; None where the scorer can't load it.

    Raises:
        InvalidRequestError: the field ``uncertainty`` is neither a boolean nor an object of known options.
    """
    body = {name: value for name, value in request.items() if name != _FIELD}
    asked = request.get(_FIELD)
    options = read_options(asked) if asked is not None or by_default else None
    if options is None:
        return RequestPlan(route, body, unscored="off")
    grammar = _grammar_forces_tokens(request)
    hides = route == "chat" and parses is not False and not _flag(request, "include_reasoning", default=True)
    echo = route == "completion" and _flag(request, "echo")
    model = request.get("model")
    adapter = adapter_path(model) if isinstance(model, str) and model in adapters else None
    without_adapter = adapters if adapter is None else ()
    reason = not_now or _skip_reason(
        route, request, without_adapter, hides=hides, grammar=grammar, parses=parses, echo=echo
    )
    if reason is not None:
        return RequestPlan(route, body, skip=reason, options=options, keep_token_ids=True, keep_logprobs=True)
    logprobs = request.get("logprobs")
    keep_logprobs = logprobs is not None and logprobs is not False  # completions: 0 is a wish
    # Either of these without logprobs is an error: vLLM's to report. Logprobs of an echoed prompt are dear.
    adds_logprobs = not (keep_logprobs or request.get("top_logprobs") or request.get("logprob_token_ids") or echo)
    keep_token_ids = _flag(request, "return_token_ids")
    body["return_token_ids"] = True
    if adds_logprobs:
        body["logprobs"] = True if route == "chat" else 0
    if hides:
        body["include_reasoning"] = True
    template_options = request.get("chat_template_kwargs")
    return RequestPlan(
        route,
        body,
        options=options,
        keep_token_ids=keep_token_ids,
        keep_logprobs=keep_logprobs,
        comparable=(keep_logprobs or adds_logprobs) and not grammar,
        grammar=grammar,
        hide_reasoning=hides,
        echo=echo,
        echoed=_texts(request.get("prompt")) if echo and not keep_token_ids else (),
        choices_per_prompt=_whole_number(request.get("n")) or 1,
        template_options=template_options if isinstance(template_options, Mapping) else {},
        keep_text=keep_text,
        adapter=adapter,
    )


def read_options(value: Any) -> RequestOptions | None:
    """The request's field ``uncertainty``; None where the client wants no score.

    Raises:
        InvalidRequestError: it is neither a boolean nor an object of known options.
    """
    if value is None or isinstance(value, bool):
        return None if value is False else DEFAULT_OPTIONS
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"uncertainty must be true, false or an object of options, not {value!r:.80}")
    for option, chosen in value.items():
        if option == _CALIBRATION:
            if not isinstance(chosen, str | None):
                raise InvalidRequestError(f"uncertainty.{option} must be a name, not {chosen!r:.80}")
            continue
        allowed = _OPTIONS.get(option)
        if allowed is None:
            known = ", ".join([*_OPTIONS, _CALIBRATION])
            raise InvalidRequestError(f"uncertainty.{option} is unknown; options: {known}")
        if not any(chosen is one or (isinstance(one, str) and chosen == one) for one in allowed):
            right = " or ".join(repr(one) for one in allowed if one is not None)
            raise InvalidRequestError(f"uncertainty.{option}={chosen!r:.80} is not supported; use {right}")
    return RequestOptions(**value)


def _skip_reason(
    route: Route,
    request: Mapping[str, Any],
    adapters: Container[str],
    *,
    hides: bool,
    grammar: bool,
    parses: bool | None,
    echo: bool,
) -> str | None:
    if isinstance(model := request.get("model"), str) and model in adapters:
        return ADAPTER_NOT_LOADED
    if request.get("prompt_embeds"):
        return "prompt_embeds have no token ids"
    if route == "chat" and _has_media(request.get("messages")):
        return "image, audio or video in the prompt"
    if hides and parses is None:
        return "include_reasoning=false withholds the token ids"
    if hides and (grammar or request.get("tools")):
        # vLLM then lets the grammar begin at the first token; asked otherwise, it would answer otherwise.
        return "include_reasoning=false with tools or a grammar withholds the token ids"
    if echo and _whole_number(request.get("max_tokens")) == 0:
        return "nothing was generated: max_tokens=0"
    to_put_back = echo and not _flag(request, "return_token_ids")  # else vLLM itself leaves the prompt out
    if to_put_back and not (_texts(request.get("prompt")) and request.get("truncate_prompt_tokens") is None):
        return "echo of a prompt of token ids, or of a truncated one, is not scored"
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
    if bool(request.get("structured_outputs")) or choice == "required" or isinstance(choice, Mapping):
        return True
    return choice != "none" and any(map(_is_strict, _list(request.get("tools"))))


def _is_strict(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return isinstance(function, Mapping) and bool(function.get("strict"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _texts(prompt: Any) -> tuple[str, ...]:
    """The prompts of a completion where they are texts, else nothing."""
    prompts = prompt if isinstance(prompt, list) else [prompt]
    return tuple(prompts) if all(isinstance(one, str) for one in prompts) else ()


_BOOL, _INT = TypeAdapter(bool), TypeAdapter(int)


def _flag(request: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """A boolean as vLLM reads it ("yes" is true); what is none is vLLM's to refuse."""
    try:
        return _BOOL.validate_python(request.get(name, default))
    except ValidationError:
        return default


def _whole_number(value: Any) -> int | None:
    try:
        return _INT.validate_python(value)
    except ValidationError:
        return None
