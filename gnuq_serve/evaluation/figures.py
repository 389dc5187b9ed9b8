"""The figures of an evaluation's report: AUROC of all methods with intervals, and risk-coverage curves."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from gnuq_serve.calibration.drawing import FAINT, INK, RIGHT, WRONG, percent, png
from gnuq_serve.evaluation.metrics import risk_coverage
from gnuq_serve.evaluation.results import MethodResult, SetResult

# One of each kind, where they are there; the best by AUROC is added.
_SHOWN = ("mean_nll", "epistemic", "semgrad", "p_true", "semantic_entropy")
_COLOURS = (INK, RIGHT, "#4d9221", "#b2abd2", "#e08214", WRONG)


def figures(one: SetResult) -> dict[str, bytes]:
    """PNG by name: ``auroc``, ``risk_coverage``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    usable = [result for result in one.methods if result.metrics["auroc"].value is not None]
    return {
        "auroc": png(partial(_aurocs, usable), 1.0 + 0.21 * len(usable)),
        "risk_coverage": png(partial(_curves, one, usable), 4.2),
    }


def _aurocs(results: list[MethodResult], figure: Any) -> None:
    axes = figure.add_subplot()
    ranked = sorted(results, key=lambda result: result.metrics["auroc"].value or 0.0)
    for at, result in enumerate(ranked):
        auroc = result.metrics["auroc"]
        colour = WRONG if result.method.supervised else INK if not result.cost.passes else RIGHT
        if auroc.low is not None:
            axes.plot([auroc.low, auroc.high], [at, at], color=colour, linewidth=1.4, alpha=0.6)
        axes.plot([auroc.value], [at], "o", color=colour, markersize=4)
    for label, colour in (("free", INK), ("costs a pass or samples", RIGHT), ("supervised", WRONG)):
        axes.plot([], [], "o", color=colour, markersize=4, label=label)
    axes.axvline(0.5, color=FAINT, linewidth=0.9, linestyle="--")
    axes.set_yticks(range(len(ranked)), [result.method.name for result in ranked], fontsize=7)
    axes.set(xlabel="AUROC for wrong answers (95 % interval)")
    axes.legend(frameon=False, fontsize=7, loc="lower right")


def _curves(one: SetResult, results: list[MethodResult], figure: Any) -> None:
    axes = figure.add_subplot()
    shown = [result for result in results if result.method.name in _SHOWN]
    best = max(results, key=lambda result: result.metrics["auroc"].value or 0.0, default=None)
    if best is not None and best not in shown:
        shown.append(best)
    for result, colour in zip(shown, _COLOURS, strict=False):
        there = np.isfinite(result.values)
        coverage, risk = risk_coverage(result.values[there], one.correct[there])
        axes.plot(coverage, risk, color=colour, linewidth=1.3, label=result.method.name)
    axes.axhline(
        1.0 - one.right / len(one.answers), color=FAINT, linewidth=0.9, linestyle="--", label="all answers"
    )
    axes.set(
        xlim=(0, 1.02), ylim=(0, 1.02), xlabel="share of questions answered", ylabel="share of errors among them"
    )
    percent(axes, "both")
    axes.legend(frameon=False, fontsize=8)
