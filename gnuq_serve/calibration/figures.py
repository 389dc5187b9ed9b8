"""The figures of a calibration's report, as PNG: risk and coverage, reliability, scores of right and wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gnuq_serve.calibration.drawing import FAINT, INK, RIGHT, WRONG, percent, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gnuq_serve.calibration import Outcome


def figures(outcome: Outcome) -> dict[str, bytes]:
    """PNG files by name: ``risk_coverage.png``, ``reliability.png``, ``scores.png``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawings: dict[str, tuple[Callable[..., None], float]] = {
        "risk_coverage.png": (_risk_coverage, 4.2),
        "reliability.png": (_reliability, 4.2),
        "scores.png": (_scores, 3.2),
    }
    return {name: png(partial(draw, outcome=outcome), height) for name, (draw, height) in drawings.items()}


def _risk_coverage(figure: Any, outcome: Outcome) -> None:
    axes: Axes = figure.add_subplot()
    guarantee = outcome.guarantee
    curve = guarantee.curve
    axes.plot(
        [point.share for point in curve],
        [point.risk for point in curve],
        color=RIGHT,
        linewidth=1.5,
        label="error rate seen",
    )
    band = guarantee.band
    if band:
        shares, risks = [point.share for point in band], [point.risk for point in band]
        above = [point.upper - point.risk for point in band]
        # Bars and no shaded area: the bound holds at these thresholds, not between them.
        axes.errorbar(
            shares,
            risks,
            yerr=np.array([[0.0] * len(band), above]),
            fmt="none",
            ecolor=FAINT,
            elinewidth=1.2,
            capsize=3,
            label=f"upper bound, all together {guarantee.confidence:.0%}",
        )
    for number, promise in enumerate(guarantee.promises):
        axes.axhline(
            promise.max_error,
            color=WRONG,
            linewidth=0.9,
            linestyle="--",
            label="level asked for" if number == 0 else None,
        )
    chosen = [promise for promise in guarantee.promises if promise.threshold is not None]
    if chosen:
        axes.plot(
            [promise.share for promise in chosen],
            [promise.errors / promise.answered if promise.answered else 0.0 for promise in chosen],
            "o",
            color=WRONG,
            markersize=8,
            label="chosen threshold",
            zorder=5,
        )
    highest = [point.risk for point in curve] + [promise.max_error for promise in guarantee.promises]
    axes.set(
        xlim=(0, 1.02),
        ylim=(0, min(1.02, max(0.2, 1.6 * max(highest, default=0.2)))),
        xlabel="share of questions answered",
        ylabel="share of errors among them",
    )
    percent(axes, "both")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _reliability(figure: Any, outcome: Outcome) -> None:
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = outcome.quality.bins
    middles = [(part.low + part.high) / 2 for part in bins]
    widths = [part.high - part.low for part in bins]
    above.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--", label="perfect")
    shares, counts = [part.accuracy for part in bins], [part.count for part in bins]
    errors = _wilson(shares, counts)
    above.errorbar(
        [part.mean_p for part in bins],
        shares,
        yerr=errors,
        fmt="o",
        color=RIGHT,
        ecolor=RIGHT,
        elinewidth=1,
        capsize=3,
        label="answers in ten bins (95 % interval)",
    )
    above.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel="share right")
    above.legend(frameon=False, fontsize=8, loc="upper left")
    below.bar(middles, counts, width=[0.94 * width for width in widths], color=FAINT)
    below.set(xlabel="p_correct", ylabel="answers")
    percent(above, "y")


def _scores(figure: Any, outcome: Outcome) -> None:
    axes: Axes = figure.add_subplot()
    edges = np.linspace(0, 1, 21).tolist()
    for correct, name, color in ((True, "right", RIGHT), (False, "wrong", WRONG)):
        scores = [held.p_correct for held in outcome.held_out if held.correct is correct]
        axes.hist(scores, bins=edges, color=color, alpha=0.55, edgecolor="white", label=f"{name} ({len(scores)})")
    for number, promise in enumerate(p for p in outcome.guarantee.promises if p.threshold is not None):
        axes.axvline(
            promise.threshold or 0.0,
            color=INK,
            linewidth=1,
            linestyle="--",
            label="threshold" if number == 0 else None,
        )
    axes.set(xlim=(0, 1), xlabel="p_correct", ylabel="held-out answers")
    axes.legend(frameon=False, fontsize=8)


def _wilson(shares: Sequence[float], counts: Sequence[int]) -> Any:
    """Distances to the ends of 95 % Wilson intervals, shape (2, bins)."""
    share, count, z = np.array(shares), np.array(counts, dtype=float), 1.959964
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return np.clip([share - (middle - half), middle + half - share], 0.0, None)
