"""Uncertainty for served language models: vLLM answers, one gradient pass scores."""

from typing import TYPE_CHECKING, Any

from gnuq_serve.policy import Decision, Policy
from gnuq_serve.uncertainty import Normalized, Signals, Uncertainty

if TYPE_CHECKING:
    from gnuq_serve.calibration import Calibration
    from gnuq_serve.scorer import Sample, Scorer

__all__ = ["Calibration", "Decision", "Normalized", "Policy", "Sample", "Scorer", "Signals", "Uncertainty"]


def __getattr__(name: str) -> Any:
    # It brings numpy, which `Uncertainty` and `Policy` do without.
    if name == "Calibration":
        from gnuq_serve.calibration import Calibration

        return Calibration
    # The scorer brings torch and transformers: seconds to import, and absent on a client.
    if name in {"Sample", "Scorer"}:
        try:
            from gnuq_serve import scorer
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{name} needs {error.name}, not installed here: pip install 'gnuq-serve[scorer]'"
            ) from error
        return getattr(scorer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
