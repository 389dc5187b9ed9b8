"""How well each signal tells right answers from wrong ones, and whether the gradient pass earns its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gnuq_serve.calibration.arrays import BoolArray, FloatArray, IntArray
from gnuq_serve.calibration.features import FEATURES
from gnuq_serve.calibration.fit import Candidate, Fit, fit_logistic, probabilities
from gnuq_serve.calibration.metrics import Interval, auroc, bootstrap_aurocs, interval

SignalKind = Literal["free", "gradient", "semantic", "set", "chosen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalQuality:
    """AUROC for "right" on held-out rows: of one signal, oriented on the fit's rows, or of a fitted set."""

    name: str
    kind: SignalKind
    features: tuple[str, ...]
    auroc: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Does the gradient pass earn its cost on these rows?

    ``earns``: ``yes``, the fit chose a gradient signal and the held-out gain lies above 0; ``unclear``, only one
    of the two; ``no``, neither; ``unknown``, the rows carry no gradient signal. ``gain`` is the AUROC of the
    best choice with gradient signals minus that of the best without, on held-out rows, with a paired interval.
    """

    earns: Literal["yes", "unclear", "no", "unknown"]
    gain: Interval
    free: str | None
    gradient: str | None
    sentence: str


def compare_signals(
    fitted: Fit,
    names: Sequence[str],
    *,
    inside: tuple[FloatArray, BoolArray],
    outside: tuple[FloatArray, BoolArray],
    p_correct: FloatArray,
    groups: IntArray,
    resamples: int,
    seed: int,
) -> tuple[tuple[SignalQuality, ...], Verdict]:
    """AUROCs of all signals and sets on held-out rows, and the verdict on the gradient.

    Args:
        fitted: the fit on ``inside``.
        names: of the columns.
        inside: ``(values, labels)`` of the fit.
        outside: ``(values, labels)`` held out.
        p_correct: the chosen probability on ``outside``.
        groups: group numbers of ``outside``.
        resamples: of the paired bootstrap over groups.
        seed: of the resamples.
    """
    fit_values, fit_right = inside
    values, right = outside
    rows: list[tuple[str, SignalKind, tuple[str, ...], FloatArray]] = []
    for column, name in enumerate(names):
        if FEATURES[name].of is not None:  # the same order as the signal itself
            continue
        up = auroc(fit_values[:, column], fit_right)
        sign = -1.0 if up is not None and up < 0.5 else 1.0
        rows.append((name, FEATURES[name].kind, (name,), sign * values[:, column]))
    sets = [candidate for candidate in fitted.candidates if len(candidate.features) > 1]
    for candidate in sets:
        columns = [list(names).index(feature) for feature in candidate.features]
        model = fit_logistic(fit_values[:, columns], candidate.features, fit_right, candidate.strength)
        rows.append((candidate.name, "set", candidate.features, probabilities(model, values[:, columns])))
    rows.append(("p_correct", "chosen", fitted.features, p_correct))
    resampled = bootstrap_aurocs([row[3] for row in rows], right, groups, resamples=resamples, seed=seed)
    table = tuple(
        SignalQuality(
            name=name, kind=kind, features=used, auroc=interval(auroc(score, right), resampled[:, place])
        )
        for place, (name, kind, used, score) in enumerate(rows)
    )
    return table, _verdict(fitted, table, resampled)


def _verdict(fitted: Fit, table: Sequence[SignalQuality], resampled: FloatArray) -> Verdict:
    nothing = Interval(value=None, low=None, high=None)
    free = _choice([candidate for candidate in fitted.candidates if candidate.kind == "free"])
    gradient = _choice([candidate for candidate in fitted.candidates if candidate.kind != "free"])
    if gradient is None:
        sentence = "The rows carry no usable gradient signals: whether the gradient pass would help is not known."
        return Verdict(
            earns="unknown",
            gain=nothing,
            free=None if free is None else _ranked_by(free),
            gradient=None,
            sentence=sentence,
        )
    uses = any(FEATURES[name].kind != "free" for name in fitted.features)
    if free is None:
        return Verdict(
            earns="unclear",
            gain=nothing,
            free=None,
            gradient=gradient.name,
            sentence="The rows carry no signal without the gradient: there is nothing to compare with.",
        )
    places = {row.name: place for place, row in enumerate(table)}
    with_gradient, without = _ranked_by(gradient), _ranked_by(free)
    high, low = table[places[with_gradient]].auroc.value, table[places[without]].auroc.value
    value = None if high is None or low is None else high - low
    gain = interval(value, resampled[:, places[with_gradient]] - resampled[:, places[without]])
    positive = gain.low is not None and gain.low > 0.0
    earns: Literal["yes", "unclear", "no"] = (
        "yes" if uses and positive else "unclear" if uses or positive else "no"
    )
    return Verdict(
        earns=earns,
        gain=gain,
        free=without,
        gradient=with_gradient,
        sentence=_sentence(earns, uses, gain, without, with_gradient),
    )


def _ranked_by(candidate: Candidate) -> str:
    """The row of the table that orders answers as this candidate does."""
    if len(candidate.features) > 1:
        return candidate.name
    return FEATURES[candidate.name].of or candidate.name


def _choice(candidates: Sequence[Candidate]) -> Candidate | None:
    """The lowest log loss among single signals, unless a set is better by a standard error."""
    alone = min((c for c in candidates if len(c.features) == 1), key=lambda c: c.excess, default=None)
    best = min(candidates, key=lambda c: c.excess, default=None)
    if alone is None or best is None or alone.excess - best.excess > alone.standard_error:
        return best
    return alone


def _sentence(earns: str, uses: bool, gain: Interval, free: str, gradient: str) -> str:
    if gain.value is None or gain.low is None or gain.high is None:
        compared = "the held-out rows do not allow a comparison"
    else:
        compared = (
            f"AUROC {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] on held-out rows, "
            f"{gradient} against {free}"
        )
    needs = "the calibration uses it" if uses else "the calibration needs no gradient pass"
    opening = {
        "yes": "The gradient pass earns its cost on this data",
        "unclear": "It is unclear whether the gradient pass earns its cost on this data",
        "no": "Nothing shows that the gradient pass earns its cost on this data",
    }[earns]
    return f"{opening} ({compared}); {needs}."
