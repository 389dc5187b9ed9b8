"""The figures of the two experiments, as PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gnuq_serve.calibration.drawing import FAINT, INK, RIGHT, WRONG, png

# Label, colour and marker of each region.
_REGIONS = {"near": ("near", RIGHT, "o"), "far": ("far", WRONG, "s"), "all": ("both", INK, "^")}
_WIDTH = 9.6
# Side by side, so that intervals can be told apart.
_SHIFT = {"o": 0.95, "s": 1.0, "^": 1.05, "x": 1.1}


def synthetic_figure(report: Mapping[str, Any]) -> bytes:
    """Correlation against the number of parameters: epistemic and aleatoric, Spearman and Pearson."""
    titles = {
        "epistemic": "‖∇p‖² with the posterior variance of p",
        "aleatoric": "p(1-p) with its posterior mean",
    }

    def draw(figure: Any) -> None:
        axes = figure.subplots(2, 2, sharex=True, sharey=True)
        for column, (name, title) in enumerate(titles.items()):
            for row, measure in enumerate(("spearman", "pearson")):
                one = axes[row, column]
                for region, (label, colour, marker) in _REGIONS.items():
                    _line(one, _points(report, name, region, measure), label, colour, marker)
                if name == "epistemic":
                    points = _points(report, "p(1-p) for epistemic", "all", measure)
                    _line(one, points, "both, by p(1-p)", FAINT, "x")
                one.axhline(0, color=FAINT, linewidth=0.6)
                one.set(xscale="log", ylim=(-0.55, 1.02), ylabel=f"{measure.capitalize()}'s correlation")
            axes[0, column].set_title(title, fontsize=10)
            axes[1, column].set_xlabel("parameters")
        axes[0, 0].legend(frameon=False, fontsize=8, loc="lower right")

    return png(draw, 6.4, _WIDTH)


def covariance_figure(report: Mapping[str, Any]) -> bytes:
    """Spearman's correlation and spread of log ratios for each covariance, with intervals over all runs."""
    names = list(report["overall"])
    at = np.arange(len(names))[::-1]
    titles = {"spearman": "Spearman's correlation with NUTS", "log_spread": "spread of log(estimate / NUTS)"}

    def draw(figure: Any) -> None:
        both = figure.subplots(1, 2, sharey=True)
        for axes, (measure, title) in zip(both, titles.items(), strict=True):
            for shift, (region, (label, colour, marker)) in zip((0.2, 0.0, -0.2), _REGIONS.items(), strict=True):
                cells = [report["overall"][name][region][measure] for name in names]
                known = [(y + shift, *_bounds(cell)) for y, cell in zip(at, cells, strict=True) if cell["runs"]]
                if known:
                    y, mean, low, high = np.array(known).T
                    error = [mean - low, high - mean]
                    axes.errorbar(
                        mean, y, xerr=error, fmt=marker, color=colour, markersize=4, elinewidth=1, label=label
                    )
            axes.set_title(title, fontsize=10)
            axes.set_yticks(at, names)
            axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        both[0].legend(frameon=False, fontsize=8)

    return png(draw, 5.6, _WIDTH)


def _points(report: Mapping[str, Any], name: str, region: str, measure: str) -> list[tuple[float, ...]]:
    """(parameters, mean, low, high) by size; problems with other numbers of classes differ a little in size."""
    cells = [
        (float(np.mean(one["parameters"])), one["agreement"][name][region][measure]) for one in report["by_size"]
    ]
    return [(size, *_bounds(cell)) for size, cell in cells if cell["runs"]]


def _bounds(cell: Mapping[str, Any]) -> tuple[float, float, float]:
    return cell["mean"], cell["low"], cell["high"]


def _line(axes: Any, points: Sequence[tuple[float, ...]], label: str, colour: str, marker: str) -> None:
    if not points:
        return
    size, mean, low, high = np.array(points).T
    size = size * _SHIFT[marker]
    error = [mean - low, high - mean]
    axes.errorbar(
        size,
        mean,
        yerr=error,
        color=colour,
        marker=marker,
        markersize=4,
        linewidth=1.2,
        elinewidth=0.9,
        label=label,
    )
