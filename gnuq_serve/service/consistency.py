"""Does the scorer see what the engine saw? Their log-probabilities of the same tokens must agree."""

from __future__ import annotations

import math

from gnuq_serve.uncertainty import Uncertainty

# |difference of l| that rounding explains, for answers up to 32 tokens; rounding errors of longer ones add up
# like a random walk. float32: measured at most 3e-4 over 20 answers.
_TOLERANCE = {"float64": 0.01, "float32": 0.01, "float16": 0.1, "bfloat16": 0.5}


def tolerance(tokens: int, *dtypes: str) -> float:
    """Largest difference of ``l`` that is no cause for a warning, by the coarsest dtype involved."""
    widest = max(_TOLERANCE.get(dtype, 0.5) for dtype in dtypes)
    return widest * max(1.0, math.sqrt(tokens / 32))


def check_log_probability(uncertainty: Uncertainty, served: float | None, *dtypes: str) -> Uncertainty:
    """Add a warning where the served log-probability of the answer differs from the scorer's by too much.

    Args:
        uncertainty: the score.
        served: the engine's ``l`` of the same tokens; None: nothing to compare with.
        dtypes: the engine's dtype and the scorer's.
    """
    if served is None or uncertainty.log_probability is None or uncertainty.tokens is None:
        return uncertainty
    difference = abs(uncertainty.log_probability - served)
    if difference <= tolerance(uncertainty.tokens, *dtypes):
        return uncertainty
    warning = (
        f"the scorer's log-probability {uncertainty.log_probability:.4f} differs from the engine's {served:.4f}: "
        "their weights, or the way they read the prompt, differ"
    )
    return uncertainty.replace(warnings=(*uncertainty.warnings, warning))
