"""What an experiment found, as plain JSON: refused runs, agreement by size, change with size, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gnuq_serve.validation.agreement import MEASURES, REGIONS, Bounds, agreement, slope, summarise
from gnuq_serve.validation.study import SOURCES

# What is compared with what; `point` is p (1 - p) of the trained network.
SYNTHETIC = {
    "epistemic": ("isotropic", "variance"),
    "aleatoric": ("point", "bernoulli"),
    # Does the gradient say more than p (1 - p), and how well does the reference know its own variance?
    "p(1-p) for epistemic": ("point", "variance"),
    "reference's halves": ("half_0", "half_1"),
}
KINDS = ("diagonal", "kfac", "full")
COVARIANCE = {"isotropic": ("isotropic", "variance")} | {
    f"{kind}:{source}": (f"{kind}:{source}", "variance") for kind in KINDS for source in SOURCES
}


def synthetic_report(rows: Sequence[Mapping[str, Any]], bounds: Bounds) -> dict[str, Any]:
    """``runs``, ``refused``, ``by_size`` (mean over runs), ``by_problem``, and ``slopes`` (change per decade)."""
    kept, report = _split(rows, bounds, SYNTHETIC)
    report["by_size"] = _by_size(kept, SYNTHETIC)
    report["by_problem"] = {
        problem: _by_size([run for run in kept if run["problem"] == problem], SYNTHETIC)
        for problem in dict.fromkeys(run["problem"] for run in kept)
    }
    report["slopes"] = {
        name: {
            region: {measure: _slope_of(kept, name, region, measure) for measure in MEASURES}
            for region in REGIONS
        }
        for name in SYNTHETIC
    }
    return report


def covariance_report(rows: Sequence[Mapping[str, Any]], bounds: Bounds) -> dict[str, Any]:
    """``runs``, ``refused``, ``by_size``, ``overall`` (all sizes), ``against_isotropic`` (paired differences)."""
    kept, report = _split(rows, bounds, COVARIANCE)
    report["by_size"] = _by_size(kept, COVARIANCE)
    report["overall"] = _table(kept, COVARIANCE)
    report["against_isotropic"] = {
        name: {
            region: {measure: summarise(_differences(kept, name, region, measure)) for measure in MEASURES}
            for region in REGIONS
        }
        for name in COVARIANCE
        if name != "isotropic"
    }
    return report


def _split(
    rows: Sequence[Mapping[str, Any]], bounds: Bounds, pairs: Mapping[str, tuple[str, str]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    kept, refused = [], []
    for row in rows:
        plain = {name: value for name, value in row.items() if name != "inputs"}
        if reason := bounds.refusal(row):
            refused.append(plain | {"reason": reason})
        else:
            kept.append(plain | {"agreement": agreement(row, pairs)})
    return kept, {"runs": kept, "refused": refused}


def _by_size(kept: Sequence[Mapping[str, Any]], pairs: Mapping[str, Any]) -> list[dict[str, Any]]:
    widths = sorted({run["width"] for run in kept})
    tables = []
    for width in widths:
        runs = [run for run in kept if run["width"] == width]
        sizes = sorted({run["parameters"] for run in runs})
        tables.append({"width": width, "parameters": sizes, "agreement": _table(runs, pairs)})
    return tables


def _table(runs: Sequence[Mapping[str, Any]], pairs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {
            region: {measure: summarise(_values(runs, name, region, measure)) for measure in MEASURES}
            for region in REGIONS
        }
        for name in pairs
    }


def _values(runs: Sequence[Mapping[str, Any]], name: str, region: str, measure: str) -> list[float]:
    found = [run["agreement"][name][region][measure] for run in runs]
    return [value for value in found if value is not None]


def _differences(runs: Sequence[Mapping[str, Any]], name: str, region: str, measure: str) -> list[float]:
    pairs = [
        (run["agreement"][name][region][measure], run["agreement"]["isotropic"][region][measure]) for run in runs
    ]
    return [other - own for other, own in pairs if other is not None and own is not None]


def _slope_of(runs: Sequence[Mapping[str, Any]], name: str, region: str, measure: str) -> dict[str, Any]:
    known = [run for run in runs if run["agreement"][name][region][measure] is not None]
    return slope(
        [run["parameters"] for run in known],
        _values(known, name, region, measure),
        [run["problem"] for run in known],
    )
