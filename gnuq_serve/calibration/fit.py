"""Fits ``p_correct``: logistic regression, with shrinkage and the choice of signals inside cross-validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gnuq_serve.calibration.arrays import BoolArray, FloatArray, IntArray
from gnuq_serve.calibration.artefact import LogisticScore
from gnuq_serve.calibration.features import FEATURES, Kind

FOLDS = 5
_STRENGTHS_OF_SETS = (0.01, 0.1, 1.0, 10.0)
_STRENGTHS_OF_ONE = (1.0,)
_REPEATS_BELOW = 3000  # rows; more rows make the split of one cross-validation matter little
_REPEATS = 2
_KINDS: tuple[Kind, ...] = ("free", "gradient", "semantic")

FREE_SET = "free signals"
GRADIENT_SET = "free and gradient signals"
SEMANTIC_SET = "free, gradient and semantic signals"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One choice of signals, with the best of its shrinkage strengths.

    ``log_loss``: mean over rows that were left out of the fit, in nats. ``excess``: by how much that is above the
    best candidate's; ``standard_error``: of this excess, over groups. ``strength``: scikit-learn's ``C``.
    """

    name: str
    kind: Kind
    features: tuple[str, ...]
    strength: float
    log_loss: float
    excess: float
    standard_error: float
    chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The fitted probability, and how it was chosen.

    ``cross_validated`` holds one left-out probability for each row of the fit, in their order.
    ``base_log_loss`` is that of the constant base rate.
    """

    model: LogisticScore
    features: tuple[str, ...]
    strength: float
    candidates: tuple[Candidate, ...]
    base_log_loss: float
    cross_validated: FloatArray
    notes: tuple[str, ...]


def fit(values: FloatArray, names: Sequence[str], correct: BoolArray, groups: IntArray, *, seed: int = 0) -> Fit:
    """Choose signals and shrinkage by cross-validation, and fit them on all rows.

    Candidates: each signal alone, all free ones, these with the gradient signals, and with the semantic
    ones. Every candidate sees the same folds (whole groups, both classes spread evenly). First the kind is
    chosen: the cheapest (free before gradient before semantic) whose best log loss is at most one standard
    error of the difference above the lowest of all. Of that kind a single signal is chosen unless
    a set is better by more than one standard error. So costs and size have to earn their place.

    Args:
        values: ``(rows, len(names))``, no missing numbers.
        names: of the features.
        correct: labels, one for each row.
        groups: group numbers from 0, one for each row.
        seed: of the folds.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    _need_sklearn()
    usable = [index for index in range(len(names)) if np.ptp(values[:, index]) > 0.0]
    notes = [
        f"{name} is the same on all rows and was left out"
        for index, name in enumerate(names)
        if index not in usable
    ]
    names = [names[index] for index in usable]
    values = values[:, usable]
    fewer = min(_groups_with(correct, groups), _groups_with(~correct, groups))
    if fewer < 2 or not names:
        return _unfitted(values, names, correct, notes)
    folds = list(_folds(correct, groups, min(FOLDS, fewer), seed))
    left_out: list[FloatArray] = []
    losses: list[FloatArray] = []
    proposals = _proposals(names)
    strengths = []
    for _, features in proposals:
        columns = [names.index(name) for name in features]
        tried = []
        for strength in _STRENGTHS_OF_ONE if len(features) == 1 else _STRENGTHS_OF_SETS:
            probability, loss = _cross_validate(values[:, columns], correct, folds, strength)
            tried.append((float(loss.mean()), strength, probability, loss))
        _, strength, probability, loss = min(tried, key=lambda entry: entry[0])
        strengths.append(strength)
        left_out.append(probability)
        losses.append(loss)
    best = losses[int(np.argmin([loss.mean() for loss in losses]))]
    excesses = [float((loss - best).mean()) for loss in losses]
    errors = [_standard_error(loss - best, groups) for loss in losses]
    kinds = [_kind(features) for _, features in proposals]
    places = range(len(proposals))
    close = [place for place in places if excesses[place] <= errors[place]]
    kind = min((kinds[place] for place in close), key=_KINDS.index)
    chosen = _within_kind([place for place in places if kinds[place] == kind], proposals, losses, groups)
    features = proposals[chosen][1]
    columns = [names.index(name) for name in features]
    base = _base_log_loss(correct, folds)
    gain = base - losses[chosen]
    if gain.mean() <= 2.0 * _standard_error(gain, groups):
        notes.append(
            "no signal is clearly better than the base rate in cross-validation: p_correct may carry nothing here"
        )
    return Fit(
        model=fit_logistic(values[:, columns], features, correct, strengths[chosen]),
        features=features,
        strength=strengths[chosen],
        candidates=tuple(
            Candidate(
                name=proposals[index][0],
                kind=kinds[index],
                features=proposals[index][1],
                strength=strengths[index],
                log_loss=float(losses[index].mean()),
                excess=excesses[index],
                standard_error=errors[index],
                chosen=index == chosen,
            )
            for index in range(len(proposals))
        ),
        base_log_loss=float(base.mean()),
        cross_validated=left_out[chosen],
        notes=tuple(notes),
    )


def fit_logistic(
    values: FloatArray, features: Sequence[str], correct: BoolArray, strength: float
) -> LogisticScore:
    """L2-penalised logistic regression on standardised columns; ``strength`` is scikit-learn's ``C``."""
    import sklearn
    from sklearn.linear_model import LogisticRegression

    means, scales = values.mean(axis=0), values.std(axis=0)
    scales = np.where(scales > 0.0, scales, 1.0)
    regression = LogisticRegression(C=strength, max_iter=1000)
    # Hundreds of small fits: checking the arguments takes a quarter of the time.
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        regression.fit((values - means) / scales, correct)
    return LogisticScore(
        features=tuple(features),
        means=tuple(means.tolist()),
        scales=tuple(scales.tolist()),
        weights=tuple(regression.coef_[0].tolist()),
        intercept=float(regression.intercept_[0]),
    )


def probabilities(model: LogisticScore, values: FloatArray) -> FloatArray:
    """``p_correct`` for each row of ``(rows, len(model.features))``, bit for bit as the artefact gives it."""
    return np.array([model.probability(row) for row in values.tolist()], dtype=np.float64)


def cross_fitted(
    values: FloatArray, correct: BoolArray, *, strengths: Sequence[float], seed: int = 0
) -> FloatArray | None:
    """``p_correct`` of each row from fits on other rows; the shrinkage is chosen inside of these.

    Args:
        values: ``(rows, columns)``, no missing numbers.
        correct: labels.
        strengths: scikit-learn's ``C``, one or several to choose from.
        seed: of the folds.

    Returns:
        One probability for each row; None where there are no columns, or fewer than five right or wrong rows.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    _need_sklearn()
    if not values.size or min(correct.sum(), (~correct).sum()) < FOLDS:
        return None
    alone = np.arange(correct.size)
    total, times = np.zeros(correct.size), np.zeros(correct.size)
    for inside, outside in _folds(correct, alone, FOLDS, seed):
        x, y = values[inside], correct[inside]
        strength = strengths[0]
        if len(strengths) > 1:
            inner = list(_folds(y, alone[: y.size], min(3, int(min(y.sum(), (~y).sum()))), seed, repeats=1))
            losses = [_cross_validate(x, y, inner, one)[1].mean() for one in strengths]
            strength = strengths[int(np.argmin(losses))]
        total[outside] += _cross_validate(values, correct, [(inside, outside)], strength)[0][outside]
        times[outside] += 1
    return total / times


def _proposals(names: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """``(name, features)`` of every candidate."""
    by_kind = {kind: [name for name in names if FEATURES[name].kind == kind] for kind in _KINDS}
    proposals: list[tuple[str, tuple[str, ...]]] = [(name, (name,)) for name in names]
    if len(by_kind["free"]) > 1:
        proposals.append((FREE_SET, tuple(by_kind["free"])))
    if by_kind["gradient"] and len(names) > 1:
        proposals.append((GRADIENT_SET, (*by_kind["free"], *by_kind["gradient"])))
    if by_kind["semantic"] and len(names) > 1:
        proposals.append((SEMANTIC_SET, tuple(names)))
    return proposals


def _kind(features: Sequence[str]) -> Kind:
    kinds = {FEATURES[name].kind for name in features}
    return "semantic" if "semantic" in kinds else "gradient" if "gradient" in kinds else "free"


def _within_kind(
    places: Sequence[int],
    proposals: Sequence[tuple[str, tuple[str, ...]]],
    losses: Sequence[FloatArray],
    groups: IntArray,
) -> int:
    """The best single signal, or the best of all where it is better by more than one standard error."""
    best = min(places, key=lambda place: losses[place].mean())
    alone = [place for place in places if len(proposals[place][1]) == 1]
    if not alone or best in alone:
        return best
    single = min(alone, key=lambda place: losses[place].mean())
    worse = losses[single] - losses[best]
    return best if worse.mean() > _standard_error(worse, groups) else single


def _folds(
    correct: BoolArray, groups: IntArray, folds: int, seed: int, repeats: int | None = None
) -> Iterator[tuple[IntArray, IntArray]]:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    alone = np.unique(groups).size == groups.size
    if repeats is None:
        repeats = _REPEATS if correct.size < _REPEATS_BELOW else 1
    for repeat in range(repeats):
        kind = StratifiedKFold if alone else StratifiedGroupKFold
        splitter = kind(n_splits=folds, shuffle=True, random_state=seed + repeat)
        yield from splitter.split(np.zeros(correct.size), correct, None if alone else groups)


def _cross_validate(
    values: FloatArray, correct: BoolArray, folds: Sequence[tuple[IntArray, IntArray]], strength: float
) -> tuple[FloatArray, FloatArray]:
    """Left-out probability and log loss of each row, averaged over the repeats."""
    from scipy.special import expit

    probability, loss, times = (np.zeros(correct.size) for _ in range(3))
    for inside, outside in folds:
        if correct[inside].all() or not correct[inside].any():
            p = np.full(outside.size, _base_rate(correct[inside]))
        else:
            model = fit_logistic(values[inside], [""] * values.shape[1], correct[inside], strength)
            standard = (values[outside] - model.means) / model.scales
            p = expit(model.intercept + standard @ np.array(model.weights))
        probability[outside] += p
        loss[outside] += _log_loss(p, correct[outside])
        times[outside] += 1
    times[times == 0] = np.nan  # rows in no fold
    return probability / times, loss / times


def _base_log_loss(correct: BoolArray, folds: Sequence[tuple[IntArray, IntArray]]) -> FloatArray:
    loss, times = np.zeros(correct.size), np.zeros(correct.size)
    for inside, outside in folds:
        p = np.full(outside.size, _base_rate(correct[inside]))
        loss[outside] += _log_loss(p, correct[outside])
        times[outside] += 1
    return loss / times


def _log_loss(probability: FloatArray, correct: BoolArray) -> FloatArray:
    p = np.clip(probability, 1e-12, 1.0 - 1e-12)
    return np.asarray(-np.log(np.where(correct, p, 1.0 - p)), dtype=np.float64)


def _base_rate(correct: BoolArray) -> float:
    """With one right and one wrong answer added (Laplace), so that it is never 0 or 1."""
    return (float(correct.sum()) + 1.0) / (correct.size + 2.0)


def _standard_error(differences: FloatArray, groups: IntArray) -> float:
    """Of the mean over rows, groups being independent."""
    sums = np.bincount(groups, weights=differences - differences.mean())
    sizes = np.bincount(groups)
    sums = sums[sizes > 0]
    if sums.size < 2:
        return 0.0
    return float(np.sqrt(np.square(sums).sum() * sums.size / (sums.size - 1)) / differences.size)


def _groups_with(which: BoolArray, groups: IntArray) -> int:
    return int(np.unique(groups[which]).size)


def _unfitted(values: FloatArray, names: Sequence[str], correct: BoolArray, notes: Sequence[str]) -> Fit:
    """Nothing to learn from: order by the mean token log-probability, around the base rate."""
    base = _base_rate(correct)
    preferred = ("mean_log_probability", "log_probability", *names)
    features = next(((name,) for name in preferred if name in names), ())
    column = values[:, [names.index(name) for name in features]]
    scales = tuple(float(scale) if scale > 0.0 else 1.0 for scale in column.std(axis=0))
    model = LogisticScore(
        features=features,
        means=tuple(column.mean(axis=0).tolist()),
        scales=scales,
        weights=(1.0,) * len(features),
        intercept=float(np.log(base / (1.0 - base))),
    )
    label = "right" if correct.all() else "wrong" if not correct.any() else "of nearly one kind"
    order = f"ordered by {features[0]}, unfitted" if features else "all alike"
    note = f"all {correct.size} answers for fitting are {label}: nothing can be learned, answers are {order}"
    if not names:
        note = "no signal varies over the rows: p_correct is the base rate"
    loss = float(_log_loss(np.full(correct.size, base), correct).mean())
    return Fit(
        model=model,
        features=features,
        strength=1.0,
        candidates=(),
        base_log_loss=loss,
        cross_validated=probabilities(model, column) if features else np.full(correct.size, base),
        notes=(*notes, note),
    )


def _need_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(
            f"calibrating needs {error.name}, not installed here: pip install 'gnuq-serve[calibrate]'"
        ) from error
