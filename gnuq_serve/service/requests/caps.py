"""What the operator lets clients ask for."""

from __future__ import annotations

from gnuq_serve.score_options import ScoreOptions
from gnuq_serve.service.requests.request_plan import RequestOptions
from gnuq_serve.service.settings.model import Settings


def allowed_options(
    settings: Settings, options: RequestOptions, tokens: int, answer_tokens: int, *, needs_semantic: bool
) -> tuple[ScoreOptions, list[str]]:
    """What the scorer is asked to do, and a warning for each wish that is not met.

    Args:
        settings: the operator's.
        options: what the client asked.
        tokens: length of prompt and answer together.
        answer_tokens: length of the answer.
        needs_semantic: the operator's calibration reads the semantic signals; no cap holds for it.
    """
    warnings = []
    mode, trace, semantic = options.mode or settings.mode, options.trace, options.semantic
    if mode == "exact" and settings.max_exact_tokens is not None and tokens > settings.max_exact_tokens:
        mode = "answer_only"
        warnings.append(
            f"mode answer_only: prompt and answer have {tokens} tokens "
            f"(max_exact_tokens={settings.max_exact_tokens})"
        )
    if trace and answer_tokens > settings.max_trace_tokens:
        trace = False
        warnings.append(
            f"no trace: the answer has {answer_tokens} tokens (max_trace_tokens={settings.max_trace_tokens})"
        )
    if semantic and not settings.allow_semantic:
        semantic = False
        warnings.append("no semantic signals: not allowed here (allow_semantic=false)")
    return ScoreOptions(mode, trace, semantic or needs_semantic), warnings
