"""What is written and printed: ``results.json``, ``rows.jsonl``, the table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gnuq_serve.calibration.metrics import Interval
from gnuq_serve.evaluation.results import MethodResult, SetResult


def as_json(sets: Sequence[SetResult], run: Mapping[str, Any]) -> dict[str, Any]:
    """The results as plain JSON; ``run``: how they came about."""
    return {"version": 1, **run, "sets": [_set(one) for one in sets]}


def _set(one: SetResult) -> dict[str, Any]:
    tokens = [answer.uncertainty.tokens or 0 for answer in one.answers]
    return {
        "name": one.name,
        "answers": len(one.answers),
        "right": one.right,
        "accuracy": one.right / len(one.answers) if one.answers else None,
        "mean_tokens": sum(tokens) / len(tokens) if tokens else None,
        "left_out": one.left_out,
        "hidden_positions": sorted({str(answer.uncertainty.signals.hidden_position) for answer in one.answers}),
        "fingerprints": sorted({str(answer.uncertainty.fingerprint) for answer in one.answers}),
        "seconds": one.seconds,
        "methods": [_method(result) for result in one.methods],
    }


def _method(result: MethodResult) -> dict[str, Any]:
    return {
        "name": result.method.name,
        "title": result.method.title,
        "supervised": result.method.supervised,
        "missing": result.missing,
        "right": result.right,
        **{name: asdict(value) for name, value in result.metrics.items()},
        "auroc_minus": {name: asdict(value) for name, value in result.differences.items()},
        "cost": asdict(result.cost),
    }


def write_rows(path: Path, sets: Sequence[SetResult]) -> None:
    """One line for each answer: whether it is right, and every method's value. No text."""
    with path.open("w", encoding="utf-8") as file:
        for one in sets:
            for at, answer in enumerate(one.answers):
                values = {result.method.name: _finite(result.values[at]) for result in one.methods}
                row = {
                    "set": one.name,
                    "key": answer.key,
                    "line": answer.line,
                    "correct": answer.correct,
                    "tokens": answer.uncertainty.tokens,
                    "values": values,
                }
                file.write(json.dumps(row) + "\n")


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


_HEAD = ("method", "AUROC", "right", "AUPR", "PRR", "AURC", "risk at 50 %", "missing", "seconds", "costs")


def table(one: SetResult) -> list[str]:
    """One set's results as lines of text."""
    rows = [_HEAD, *(_row(result) for result in one.methods)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD) - 1)]
    share = f"{one.right} of {len(one.answers)} answers right"
    if one.answers:
        share += f" ({one.right / len(one.answers):.1%})"
    lines = [f"{one.name}: {share}"]
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)),
        ]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return lines


def _row(result: MethodResult) -> tuple[str, ...]:
    cost = result.cost
    return (
        result.method.name,
        _interval(result.metrics["auroc"]),
        str(result.right),
        *(_number(result.metrics[name].value) for name in ("aupr", "prr", "aurc", "risk_at_0.5")),
        str(result.missing or ""),
        _number(cost.seconds) if cost.passes else "",
        cost.passes or "free",
    )


def _interval(value: Interval) -> str:
    if value.value is None:
        return "-"
    return f"{value.value:.3f} ({_number(value.low)} to {_number(value.high)})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
