"""Labelled rows as arrays, split into a part for fitting and one held out, and what is common to all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gnuq_serve.calibration.arrays import BoolArray, FloatArray, IntArray
from gnuq_serve.calibration.artefact import Seen, parts_of
from gnuq_serve.calibration.binomial import fewest_answers
from gnuq_serve.calibration.features import FEATURES, read_features
from gnuq_serve.calibration.rows import Row
from gnuq_serve.uncertainty import Uncertainty

FEWEST_ROWS = 10
_RARELY_MISSING = 0.01


@dataclass(frozen=True, slots=True)
class Table:
    """Scored rows as arrays; ``index`` points into the rows as given, ``groups`` are numbers from 0."""

    index: IntArray
    names: list[str]
    values: FloatArray
    correct: BoolArray
    groups: IntArray
    notes: list[str]


def tabulate(rows: Sequence[Row]) -> Table:
    """Rows with a score, as arrays; a signal missing on more than 1 % of them is left out.

    Raises:
        ValueError: fewer than 10 independent rows have a score.
    """
    notes = []
    scored = [index for index, row in enumerate(rows) if row.uncertainty.status == "scored"]
    if len(scored) < len(rows):
        notes.append(
            f"{len(rows) - len(scored)} of {len(rows)} rows have no score and were left out: "
            "no promise covers such answers"
        )
    all_names = list(FEATURES)
    raw = np.array(
        [read_features(rows[index].uncertainty, all_names) for index in scored], dtype=np.float64
    ).reshape(len(scored), len(all_names))
    missing = np.isnan(raw)
    dropped = missing.mean(axis=0) > _RARELY_MISSING if scored else np.ones(len(all_names), dtype=bool)
    notes += [
        f"{name} is missing on {int(missing[:, column].sum())} rows and was left out"
        for column, name in enumerate(all_names)
        if dropped[column] and not missing[:, column].all()
    ]
    whole = ~missing[:, ~dropped].any(axis=1)
    if not whole.all():
        notes.append(f"{int((~whole).sum())} rows lack a signal that the others have and were left out")
    index = np.array(scored, dtype=np.int64)[whole]
    groups = _named_groups([rows[i].group for i in index.tolist()])
    count = int(groups.max()) + 1 if groups.size else 0
    if count < FEWEST_ROWS:
        raise ValueError(
            f"{count} independent scored rows; at least {FEWEST_ROWS} are needed, and 50 to support a promise "
            "such as 10 % errors with confidence 95 %"
        )
    return Table(
        index=index,
        names=[name for column, name in enumerate(all_names) if not dropped[column]],
        values=raw[whole][:, ~dropped],
        correct=np.array([rows[i].correct for i in index.tolist()], dtype=np.bool_),
        groups=groups,
        notes=notes,
    )


def bound_fingerprint(uncertainties: Sequence[Uncertainty], known: Mapping[str, str]) -> dict[str, str]:
    """The parts known beforehand and those that the rows carry.

    Raises:
        ValueError: the rows differ in a part.
    """
    found: dict[str, set[str]] = {}
    for uncertainty in uncertainties:
        for part, value in parts_of(uncertainty).items():
            found.setdefault(part, set()).add(value)
    for part, values in found.items():
        if len(values) > 1:
            raise ValueError(
                f"the rows differ in {part} ({', '.join(sorted(values))}): their numbers do not compare; "
                "calibrate each on its own"
            )
    return {**known, **{part: values.pop() for part, values in found.items()}}


def units_held_out(groups: IntArray, share: float | None, max_error: Sequence[float], confidence: float) -> int:
    """How many groups to hold out: ``share`` of them, or half, or up to .6 (see `calibrate`)."""
    units = int(groups.max()) + 1
    if share is not None:
        return min(max(round(share * units), 1), units - 2)
    half, most = units // 2, int(0.6 * units)
    # Too few in half of them to support a level even without an error, enough in a little more.
    wanting = [level for level in max_error if half < fewest_answers(level, confidence) <= most]
    return most if wanting else half


def split(groups: IntArray, units: int, seed: int) -> BoolArray:
    """Which rows are held out: all rows of ``units`` groups drawn at random."""
    drawn = np.random.default_rng(seed).permutation(int(groups.max()) + 1)[:units]
    return np.isin(groups, drawn)


def _named_groups(names: Sequence[str | None]) -> IntArray:
    """Numbers from 0 in order of appearance; each None is a group of its own."""
    known: dict[tuple[str, str | int], int] = {}
    for index, group in enumerate(names):
        known.setdefault(("row", index) if group is None else ("group", group), len(known))
    return np.array(
        [known[("row", index) if group is None else ("group", group)] for index, group in enumerate(names)],
        dtype=np.int64,
    )


def numbered(groups: IntArray) -> IntArray:
    """Group numbers without gaps, from 0."""
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def seen_range(rows: Sequence[Row]) -> Seen:
    """The range of the rows; None for what none of them says."""

    def ends(values: Sequence[int | None]) -> tuple[int, int] | None:
        known = [value for value in values if value is not None]
        return (min(known), max(known)) if known else None

    reasons = sorted({row.finish_reason for row in rows if row.finish_reason is not None})
    return Seen(
        answer_tokens=ends([row.uncertainty.tokens for row in rows]),
        prompt_tokens=ends([row.prompt_tokens for row in rows]),
        turns=ends([row.turns for row in rows]),
        finish_reasons=tuple(reasons) or None,
        tool_calls=any(row.uncertainty.tool_call for row in rows),
    )
