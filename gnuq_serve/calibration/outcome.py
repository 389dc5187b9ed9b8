"""Labelled rows in; a calibration, and everything that a report says about it, out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gnuq_serve.calibration.arrays import BoolArray, FloatArray, IntArray
from gnuq_serve.calibration.artefact import Calibration, Data
from gnuq_serve.calibration.counts import learned_first_count
from gnuq_serve.calibration.fit import Fit, fit, probabilities
from gnuq_serve.calibration.guarantee import Guarantee, check_levels, guarantee
from gnuq_serve.calibration.metrics import Quality, quality
from gnuq_serve.calibration.rows import Row
from gnuq_serve.calibration.signals import SignalQuality, Verdict, compare_signals
from gnuq_serve.calibration.table import (
    FEWEST_ROWS,
    Table,
    bound_fingerprint,
    numbered,
    seen_range,
    split,
    tabulate,
    units_held_out,
)

_REFERENCE_SCORES = 1000
_LENGTH_BINS = 4
_FEWEST_IN_LENGTH_BIN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One held-out row: ``index`` into the rows as given, its key, and what came out."""

    index: int
    key: str | None
    p_correct: float
    correct: bool
    tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthQuality:
    """Quality of ``p_correct`` on held-out answers of ``low`` to ``high`` tokens, ends included."""

    low: int
    high: int
    quality: Quality


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A calibration and its evidence; everything but ``fit`` is measured on held-out rows.

    ``kept``: every level that was asked for got a threshold.
    """

    calibration: Calibration
    fit: Fit
    signals: tuple[SignalQuality, ...]
    verdict: Verdict
    quality: Quality
    by_length: tuple[LengthQuality, ...]
    guarantee: Guarantee
    held_out: tuple[Held, ...]
    notes: tuple[str, ...]

    @property
    def kept(self) -> bool:
        """Whether every asked level got a threshold."""
        return all(promise.threshold is not None for promise in self.guarantee.promises)


def calibrate(
    rows: Sequence[Row],
    *,
    max_error: Sequence[float] = (0.1,),
    confidence: float = 0.95,
    name: str = "calibration",
    fingerprint: Mapping[str, str] | None = None,
    held_out: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Outcome:
    """Fit ``p_correct`` on one part of the rows and find thresholds on the other.

    Args:
        rows: labelled answers; those without a score are left out and counted in ``notes``.
        max_error: levels named in advance, each a share of errors among answered questions; the first is
            the default of the calibration.
        confidence: of the promises.
        name: of the calibration.
        fingerprint: named parts of what was scored and how, as far as the caller knows them; ``scorer``, ``mode``
            and ``span`` come from the rows.
        held_out: share of the groups kept out of the fit; None: half, or up to .6 where half of them are too
            few for any answer-all promise.
        resamples: of the bootstrap.
        seed: of splits, folds and resamples.
        progress: called with one line for each step.

    Raises:
        ValueError: fewer than 10 scored groups, rows of several fingerprints, a value out of its range.
        ImportError: scikit-learn or scipy is not installed.
    """
    check_levels(max_error, confidence)
    if held_out is not None and not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out={held_out} must lie between 0 and 1, such as 0.5")
    say = progress or (lambda _: None)
    table = tabulate(rows)
    bound = bound_fingerprint([rows[index].uncertainty for index in table.index], fingerprint or {})
    outside, inside = _parts(rows, table, held_out, max_error, confidence, seed)
    say(f"fitting on {int(inside.sum())} rows, {int(outside.sum())} held out")
    inner_groups = numbered(table.groups[inside])
    fitted = fit(table.values[inside], table.names, table.correct[inside], inner_groups, seed=seed)
    columns = [table.names.index(feature) for feature in fitted.features]
    p_correct = probabilities(fitted.model, table.values[outside][:, columns])
    right, outer_groups = table.correct[outside], numbered(table.groups[outside])
    say("looking for thresholds")
    units = int(outer_groups.max()) + 1
    promised = guarantee(
        p_correct,
        right,
        max_error=max_error,
        confidence=confidence,
        groups=[str(group) for group in outer_groups.tolist()],
        first_counts={
            level: learned_first_count(
                fitted.cross_validated,
                table.correct[inside],
                units=units,
                max_error=level,
                confidence=confidence,
            )
            for level in max_error
        },
        seed=seed,
    )
    say("comparing signals")
    signals, verdict = compare_signals(
        fitted,
        table.names,
        inside=(table.values[inside], table.correct[inside]),
        outside=(table.values[outside], right),
        p_correct=p_correct,
        groups=outer_groups,
        resamples=resamples,
        seed=seed,
    )
    measured = quality(p_correct, right, outer_groups, resamples=resamples, seed=seed)
    held = tuple(
        Held(
            index=index,
            key=rows[index].key,
            p_correct=p,
            correct=rows[index].correct,
            tokens=rows[index].uncertainty.tokens,
        )
        for index, p in zip(table.index[outside].tolist(), p_correct.tolist(), strict=True)
    )
    calibration = Calibration(
        name=name,
        model=fitted.model,
        confidence=confidence,
        promises=promised.promises,
        band=promised.band,
        seen=seen_range([rows[index] for index in table.index if not rows[index].fit_only]),
        fingerprint=bound,
        data=Data(
            rows=int(table.index.size),
            fit_rows=int(inside.sum()),
            held_out_rows=int(outside.sum()),
            held_out_units=promised.units,
            accuracy=float(table.correct[~_fit_only(rows, table)].mean()),
            auroc=measured.auroc.value,
            ece=measured.ece,
            brier_skill=measured.brier_skill,
        ),
        reference_scores=_sample(p_correct),
    )
    return Outcome(
        calibration=calibration,
        fit=fitted,
        signals=signals,
        verdict=verdict,
        quality=measured,
        by_length=_by_length(held, outer_groups, resamples, seed),
        guarantee=promised,
        held_out=held,
        notes=(*table.notes, *fitted.notes),
    )


def _fit_only(rows: Sequence[Row], table: Table) -> BoolArray:
    return np.array([rows[index].fit_only for index in table.index.tolist()], dtype=np.bool_)


def _parts(
    rows: Sequence[Row],
    table: Table,
    share: float | None,
    max_error: Sequence[float],
    confidence: float,
    seed: int,
) -> tuple[BoolArray, BoolArray]:
    """Which rows are held out, and which the fit sees; a fit-only row of a held-out group is neither."""
    drawn = ~_fit_only(rows, table)
    groups = numbered(table.groups[drawn])
    count = int(groups.max()) + 1 if groups.size else 0
    if count < FEWEST_ROWS:
        raise ValueError(f"{count} independent rows to test a promise on; at least {FEWEST_ROWS} are needed")
    outside = np.zeros(drawn.size, dtype=np.bool_)
    outside[drawn] = split(groups, units_held_out(groups, share, max_error, confidence), seed)
    return outside, ~np.isin(table.groups, table.groups[outside])


def _sample(scores: FloatArray) -> tuple[float, ...]:
    """The scores in ascending order; of more than 1000, evenly spaced ones."""
    ordered = np.sort(scores)
    if ordered.size > _REFERENCE_SCORES:
        ordered = ordered[np.linspace(0, ordered.size - 1, _REFERENCE_SCORES).round().astype(int)]
    return tuple(round(score, 6) for score in ordered.tolist())


def _by_length(held: Sequence[Held], groups: IntArray, resamples: int, seed: int) -> tuple[LengthQuality, ...]:
    """Up to four bins with about as many answers each, fewer where lengths repeat or rows are few."""
    known = [place for place, row in enumerate(held) if row.tokens is not None]
    if not known:
        return ()
    tokens = np.array([held[place].tokens for place in known], dtype=np.int64)
    p_correct = np.array([held[place].p_correct for place in known])
    right = np.array([held[place].correct for place in known], dtype=np.bool_)
    bins = max(1, min(_LENGTH_BINS, len(known) // _FEWEST_IN_LENGTH_BIN))
    edges = np.unique(np.quantile(tokens, np.linspace(0.0, 1.0, bins + 1)[1:-1], method="lower"))
    place = np.searchsorted(edges, tokens, side="left")
    parts = []
    for index in np.unique(place).tolist():
        inside = place == index
        parts.append(
            LengthQuality(
                low=int(tokens[inside].min()),
                high=int(tokens[inside].max()),
                quality=quality(
                    p_correct[inside],
                    right[inside],
                    numbered(groups[known][inside]),
                    resamples=resamples,
                    seed=seed,
                ),
            )
        )
    return tuple(parts)
