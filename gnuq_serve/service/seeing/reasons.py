"""Short codes for why an answer has no score, and for warnings: labels of metrics must be few.

A reason is a sentence with numbers and names in it, for people; its code says which kind of sentence it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

OTHER = "other"

# code -> how such a sentence begins, or what it holds. The first that fits.
_REASONS = (
    ("switched_off", r"scoring is switched off"),
    ("not_drawn", r"not drawn"),
    ("overload", r"the scoring queue is full"),
    ("deadline", r"the scorer has not (started|answered) within"),
    ("scorer_starting", r"the scorer is not started yet"),
    ("scorer_died", r"the scorer process died|\d+ scorer processes died"),
    ("scorer_unavailable", r"the scorer is not running|the scorer process could not be run"),
    ("too_long", r"prompt and answer have \d+ tokens|prompt_ids and answer_ids have \d+ tokens"),
    ("adapter", r"adapter not loaded"),
    ("media", r"image, audio or video in the prompt|prompt_embeds"),
    ("thinking_only", r"there is no answer after the thinking"),
    ("no_token_ids", r"the response carries no token ids|include_reasoning=false|\w+ (is empty|holds something)"),
    ("vocabulary", r"\w+ holds .* outside the scorer's vocabulary"),
    ("echo", r"echo of|nothing was generated"),
    ("results_store", r"results are not kept|.*results_path"),
    ("not_finite", r"the model's log-probability or gradient is not finite"),
    ("memory", r"out of memory"),
    ("internal_error", r"internal error"),
)
_WARNINGS = (
    ("disagreement", r"the scorer's log-probability .* differs from the engine's"),
    ("grammar", r"a grammar forced tokens"),
    ("approximate_weights", r"approximate_weights"),
    ("thinking_boundary", r"where the thinking ends was not found"),
    ("answer_only", r"mode answer_only"),
    ("no_trace", r"no trace"),
    ("no_semantic", r"no semantic signals"),
    ("slow_path", r"slow exact path"),
    ("not_applicable", r"calibration .* does not apply"),
    ("no_threshold", r"no threshold of calibration"),
    ("calibration", r"calibration \S+ does not apply"),
)


def reason_code(reason: str | None) -> str:
    """The code of a reason; ``""`` where there is none."""
    return _code(reason, _REASONS)


def warning_code(warning: str) -> str:
    """The code of a warning."""
    return _code(warning, _WARNINGS)


def _code(sentence: str | None, table: Iterable[tuple[str, str]]) -> str:
    if not sentence:
        return ""
    return next((code for code, pattern in table if re.match(pattern, sentence)), OTHER)
