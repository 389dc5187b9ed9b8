"""How well estimates follow the reference, run by run, and over runs of one size with bootstrap intervals."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

from gnuq_serve.calibration.arrays import FloatArray

REGIONS = ("near", "far", "all")
MEASURES = ("spearman", "pearson", "log_spread")
RESAMPLES = 2000
# Networks whose p differ by less over all inputs have learnt nothing that could be compared.
CONSTANT = 1e-3


@dataclass(frozen=True, slots=True)
class Bounds:
    """When a run counts: largest R-hat and smallest effective sample size of any prediction."""

    max_rhat: float = 1.05
    min_ess: float = 100.0

    def refusal(self, row: Mapping[str, Any]) -> str | None:
        """Why a run is refused; None where it counts."""
        if "failed" in row:
            return str(row["failed"])
        if np.ptp(row["inputs"]["p"]) < CONSTANT:
            return "the trained network gives every input the same p"
        if row["rhat"] > self.max_rhat:
            return f"R-hat of a prediction is {row['rhat']:.3f}, above {self.max_rhat:g}"
        if row["ess"] < self.min_ess:
            return f"effective sample size of a prediction is {row['ess']:.0f}, under {self.min_ess:g}"
        return None


def compare(estimate: FloatArray, reference: FloatArray) -> dict[str, float | None]:
    """Correlations of an estimate with its reference, (M,) each.

    ``log_spread`` is the standard deviation of ``log(estimate / reference)``: 0 where they are proportional,
    whatever the factor, since no scale is claimed. A measure is None where one side is constant (correlations) or
    not positive (spread).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spearman, pearson = spearmanr(estimate, reference)[0], pearsonr(estimate, reference)[0]
    positive = bool((estimate > 0).all() and (reference > 0).all())
    spread = float(np.std(np.log(estimate) - np.log(reference))) if positive else float("nan")
    values = zip(MEASURES, (spearman, pearson, spread), strict=True)
    return {name: float(value) if np.isfinite(value) else None for name, value in values}


def agreement(row: Mapping[str, Any], pairs: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """`compare` for each named pair of columns, by region: ``{name: {region: {measure: value}}}``."""
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in row["inputs"].items()}
    columns["point"] = columns["p"] * (1.0 - columns["p"])
    half = len(columns["p"]) // 2
    parts = {"near": slice(0, half), "far": slice(half, None), "all": slice(None)}
    return {
        name: {region: compare(columns[left][part], columns[right][part]) for region, part in parts.items()}
        for name, (left, right) in pairs.items()
    }


def summarise(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Mean over runs with its 95 % bootstrap interval (runs drawn with replacement), and their number."""
    if not values:
        return {"mean": None, "low": None, "high": None, "runs": 0}
    array = np.asarray(values)
    drawn = array[np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"mean": float(array.mean()), "low": float(low), "high": float(high), "runs": len(array)}


def slope(
    sizes: Sequence[int], values: Sequence[float], problems: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Least-squares change of a value for ten times the parameters, each problem with a level of its own.

    The 95 % bootstrap interval draws runs with replacement within each problem.
    """
    x, y = np.log10(np.asarray(sizes, dtype=np.float64)), np.asarray(values, dtype=np.float64)
    groups = [np.flatnonzero(np.asarray(problems) == problem) for problem in dict.fromkeys(problems)]
    if not any(np.ptp(x[group]) > 0 for group in groups):
        return {"per_decade": None, "low": None, "high": None}
    rng = np.random.default_rng(seed)
    drawn = [group[rng.integers(len(group), size=(RESAMPLES, len(group)))] for group in groups]
    low, high = np.nanquantile(_slopes(x, y, drawn), [0.025, 0.975])
    return {"per_decade": float(_slopes(x, y, groups)), "low": float(low), "high": float(high)}


def _slopes(x: FloatArray, y: FloatArray, groups: Sequence[Any]) -> Any:
    """One for each row of the groups' indices; NaN where sizes don't differ within any group."""
    both: Any = 0.0
    own: Any = 0.0
    for at in groups:
        centred = x[at] - x[at].mean(-1, keepdims=True)
        both, own = both + (centred * y[at]).sum(-1), own + np.square(centred).sum(-1)
    with np.errstate(invalid="ignore"):
        return both / np.where(own > 1e-12, own, np.nan)
