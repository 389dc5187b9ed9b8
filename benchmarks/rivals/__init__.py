"""What the scorer is measured against: other ways to the same number, and the work that none can avoid.

Each rival takes samples and returns ``||grad_theta l||^2`` for each; two only mark the limit and return nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gnuq_serve import Sample, Scorer
from rivals.naive_loop import NaiveLoop
from rivals.opacus_ghost import OpacusGhostNorms
from rivals.ours import GradientPass
from rivals.same_batches import ForwardOnly, Limit
from rivals.torch_func import PerSampleGradients

Rival = Callable[[Sequence[Sample]], list[float]]

OURS = "gnuq-serve"
NAIVE = "naive loop"
FUNC = "torch.func"
OPACUS = "Opacus ghost norms"
FORWARD = "forward only"
LIMIT = "limit"
ALL = (OURS, NAIVE, FUNC, OPACUS, FORWARD, LIMIT)
VALUELESS = (FORWARD, LIMIT)


def build(name: str, scorer: Scorer) -> Rival:
    """The rival of that name, on the scorer's own model (Opacus: on an untied copy).

    Raises:
        ModuleNotFoundError: ``OPACUS`` without the package opacus.
    """
    match name:
        case "gnuq-serve":
            return GradientPass(scorer)
        case "naive loop":
            return NaiveLoop(scorer.model)
        case "torch.func":
            return PerSampleGradients(scorer.model)
        case "Opacus ghost norms":
            return OpacusGhostNorms(scorer.model)
        case "forward only":
            return ForwardOnly(scorer)
        case "limit":
            return Limit(scorer)
    raise ValueError(f"name={name!r} is no rival; choose one of {', '.join(ALL)}")
