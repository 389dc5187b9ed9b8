"""Another text in an answer's place: nothing of what the model wrote is left.

Replaced choices are built from nothing, not edited: a field that a new vLLM adds is left out, not let through.
They are legal in OpenAI's API: ``finish_reason: "content_filter"``, on which its clients do not parse a
structured answer. ``uncertainty.withheld`` says why.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gnuq_serve.service.http_messages import json_bytes
from gnuq_serve.service.requests.request_plan import RequestPlan, Route
from gnuq_serve.service.responses.gate import Withheld
from gnuq_serve.service.responses.response_edit import add_uncertainty

FINISH_REASON = "content_filter"

# All else around the choices tells of prompt or answer (prompt_logprobs, prompt_text, kv_transfer_params, …).
_KEPT = ("id", "object", "created", "model", "usage", "service_tier", "system_fingerprint")


def withhold(
    plan: RequestPlan,
    response: dict[str, Any],
    uncertainties: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Withheld | None],
    *,
    text: str,
    mirror: bool,
) -> dict[str, Any]:
    """A whole response without the answers that are held back; the others are as they were.

    Args:
        plan: the request's plan.
        response: with its uncertainties.
        uncertainties: one for each choice.
        verdicts: why each choice is held back; None for one that is not.
        text: what stands in an answer's place.
        mirror: the uncertainty goes into ``logprobs`` too.
    """
    choices = []
    triples = zip(response["choices"], uncertainties, verdicts, strict=True)
    for place, (choice, uncertainty, why) in enumerate(triples):
        if why is None:
            choices.append(choice)
            continue
        content: dict[str, Any] = {"text": text}
        if plan.route == "chat":
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        index = choice.get("index")
        new = _choice(index if isinstance(index, int) else place, content, FINISH_REASON)
        add_uncertainty(
            plan, new, marked(uncertainty, why), tool_call=bool(uncertainty.get("tool_call")), mirror=mirror
        )
        choices.append(new)
    return _around(response, choices)


def marked(uncertainty: Mapping[str, Any], why: Withheld | None) -> dict[str, Any]:
    """The uncertainty of an answer, saying that it is held back where it is."""
    return dict(uncertainty) if why is None else {**uncertainty, "withheld": why}


def withhold_events(route: Route, events: Iterable[bytes], withheld: Iterable[int], text: str) -> list[bytes]:
    """The events of a stream, before its scores, without the answers that are held back.

    Args:
        route: which API.
        events: one chunk each, as the client would get it.
        withheld: indexes of the choices that are held back.
        text: what stands in an answer's place.
    """
    waiting = set(withheld)
    held = frozenset(waiting)
    around: dict[str, Any] = {}
    new = []
    for event in events:
        chunk = json.loads(event.removeprefix(b"data:"))
        if not any(choice["index"] in held for choice in chunk["choices"]):
            new.append(event)
            continue
        around, choices = chunk, []
        for choice in chunk["choices"]:
            if choice["index"] not in held:
                choices.append(choice)
            elif choice["index"] in waiting:
                waiting.discard(choice["index"])
                opening = {"delta": {"role": "assistant", "content": text}} if route == "chat" else {"text": text}
                choices.append(_choice(choice["index"], opening, None))
        if choices:
            new.append(_event(_around(chunk, choices)))
    nothing: dict[str, Any] = {"delta": {}} if route == "chat" else {"text": ""}
    new += [_event(_around(around, [_choice(index, nothing, FINISH_REASON)])) for index in sorted(held - waiting)]
    return new


def without_choices(event: bytes) -> bytes:
    """An event after the last token, with nothing but what every response has."""
    return _event(_around(json.loads(event.removeprefix(b"data:")), []))


def _choice(index: int, content: Mapping[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}


def _around(response: Mapping[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {**{name: response[name] for name in _KEPT if name in response}, "choices": choices}


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(chunk) + b"\n\n"
