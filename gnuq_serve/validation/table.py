"""An experiment's report as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gnuq_serve.validation.agreement import REGIONS


def table(report: Mapping[str, Any]) -> list[str]:
    """Runs kept and refused; Spearman correlations by size, or over all sizes; AUROCs on a language model."""
    return [*_runs(report), *_agreement(report), *_slopes(report), *_language_model(report)]


def _runs(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"{len(report['runs'])} runs, {len(report['refused'])} refused"
    for run in report["refused"]:
        yield f"  refused: {run['problem']}, width {run['width']}, seed {run['seed']}: {run['reason']}"


def _agreement(report: Mapping[str, Any]) -> Iterator[str]:
    tables = report["by_size"]
    if "overall" in report:
        tables = [{"parameters": [], "agreement": report["overall"]}]
    for one in tables:
        sizes = f"{' and '.join(map(str, one['parameters']))} parameters" if one["parameters"] else "all sizes"
        yield f"{sizes}: Spearman's correlation {' | '.join(REGIONS)}"
        for name, cells in one["agreement"].items():
            yield f"  {name:22s} {' | '.join(_cell(cells[region]['spearman']) for region in REGIONS)}"


def _slopes(report: Mapping[str, Any]) -> Iterator[str]:
    for name in report.get("slopes", {}):
        cells = [report["slopes"][name][region]["spearman"] for region in REGIONS]
        shown = [_cell({**cell, "mean": cell["per_decade"]}) for cell in cells]
        yield f"{name}: change for ten times the parameters {' | '.join(shown)}"


def _language_model(report: Mapping[str, Any]) -> Iterator[str]:
    for name, one in report.get("language_model", {}).get("sets", {}).items():
        yield f"{name}: {one['right']} of {one['answers']} answers right; AUROC for wrong: {' | '.join(_FORMS)}"
        for covariance, cells in one["auroc"].items():
            shown = [_cell({**cells[form], "mean": cells[form]["value"]}, ".3f") for form in _FORMS]
            yield f"  {covariance:22s} {' | '.join(shown)}"


_FORMS = ("log_norm", "epistemic", "normalized_epistemic")


def _cell(cell: Mapping[str, Any], form: str = "+.2f") -> str:
    if cell["mean"] is None:
        return "none"
    if cell["low"] is None:
        return f"{cell['mean']:{form}}"
    return f"{cell['mean']:{form}} ({cell['low']:{form}} to {cell['high']:{form}})"
