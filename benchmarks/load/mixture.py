"""Mixed requests, and what must be true of each reply."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from load.client import Reply
from load.prompts import chat, questions

# Kind -> share of the requests.
SHARES = {"streamed": 0.30, "whole": 0.25, "two": 0.15, "off": 0.15, "hang-up": 0.10, "malformed": 0.05}
MALFORMED: tuple[dict[str, Any] | bytes, ...] = (
    b"{no json",
    b"",
    b"[1, 2]",
    {"uncertainty": {"mood": "exact"}},
    {"uncertainty": 7},
    {"temperature": -1},
    {"max_tokens": "many"},
    {"model": "unknown"},
    {"messages": "none"},
)


@dataclass(frozen=True)
class Request:
    """One request of the mixture."""

    kind: str
    body: dict[str, Any] | bytes
    tokens: int = 0  # that a whole answer has, all choices together
    scores: int = 0  # that it carries
    hang_up_after: float | None = None


def mixture(seed: int = 0) -> Iterator[Request]:
    """Requests for ever."""
    generator, texts = random.Random(seed), questions(seed)
    while True:
        (kind,) = generator.choices(list(SHARES), list(SHARES.values()))
        tokens, stream = generator.randint(4, 24), generator.random() < 0.5
        options = {"include_usage": True}
        streamed = {"stream": True, "stream_options": options} if stream or kind == "streamed" else {}
        body = chat(next(texts), tokens, **({} if kind == "whole" else streamed))
        if kind == "malformed":
            wrong = generator.choice(MALFORMED)
            yield Request(kind, wrong if isinstance(wrong, bytes) else body | wrong)
        elif kind == "two":
            yield Request(kind, body | {"n": 2, "temperature": 1.0}, 2 * tokens, 2)
        elif kind == "off":
            yield Request(kind, body | {"uncertainty": False}, tokens)
        elif kind == "hang-up":
            yield Request(kind, body, hang_up_after=generator.uniform(0.01, 2.0))
        else:
            yield Request(kind, body, tokens, 1)


def complaint(request: Request, reply: Reply) -> str | None:
    """What is wrong with a reply; None: nothing."""
    if request.kind == "malformed":
        error = reply.error or ""
        return (
            None if 400 <= reply.status < 500 and "error" in error else f"malformed, but {reply.status} {error}"
        )
    if request.kind == "hang-up":  # it may have been answered before
        return None if reply.hung_up or reply.complete else f"hang-up, but {reply.error}"
    if reply.status != 200 or reply.error is not None or not reply.complete:
        return f"no whole answer: status {reply.status}, {reply.error}, complete: {reply.complete}"
    if reply.completion_tokens != request.tokens:
        return f"{reply.completion_tokens} tokens instead of {request.tokens}"
    if len(reply.uncertainties) != request.scores:
        return f"{len(reply.uncertainties)} uncertainties instead of {request.scores}"
    return next(filter(None, map(_complaint_of_score, reply.uncertainties)), None)


def _complaint_of_score(uncertainty: dict[str, Any]) -> str | None:
    status = uncertainty["status"]
    if status == "scored":
        missing = [name for name in ("log_grad_norm_sq", "log_probability") if uncertainty[name] is None]
        return f"scored without {missing}" if missing else None
    if status in ("skipped", "failed"):
        return None if uncertainty.get("reason") else f"{status} without a reason"
    return f"status {json.dumps(status)}"
