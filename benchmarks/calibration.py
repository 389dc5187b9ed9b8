"""Does a calibration keep what it promises? Random splits of real scored answers, one file for each set.

Each split calibrates on one part and looks at the other. A row file holds one answer a line, with
``uncertainty`` and ``correct`` (``gnuq-serve calibrate --rows FILE`` writes them;
``benchmarks/calibration_questions.py`` prepares questions). Printed for each set:

* how often a promise was made, how often the error rate among answered test questions stayed under the level, and
  how often it was above by more than chance (exact binomial test, 5 %: a promise that holds exactly is above the
  level in half of all test parts);
* coverage: share of test questions answered, and the same for the best free signal alone, thresholds found alike;
* AUROC of ``p_correct`` minus that of the free signal that is best on the calibration part, with a 95 % bootstrap
  interval: test questions are drawn again, the same draw for both and for all splits, and splits averaged;
* ECE and Brier skill of ``p_correct`` on the test part, means over splits; which signals were chosen.

    python benchmarks/calibration.py ROWS.jsonl ... [--splits 100] [--max-error 0.1 0.2 0.3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

FEWEST_CALIBRATED = 400
RESAMPLES = 1000


@dataclass(frozen=True)
class Level:
    """What became of one level over all splits; shares of splits, means over them."""

    max_error: float
    made: float
    held: float | None
    broken_beyond_chance: float | None
    coverage: float
    coverage_of_free: float
    gained: float
    test_error: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", nargs="*", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("--splits", type=int, default=100)
    parser.add_argument("--max-error", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="three splits")
    arguments = parser.parse_args()
    if not arguments.rows:
        print("no row files: make some with `gnuq-serve calibrate --rows FILE --collect-only` and name them here")
        return
    results = []
    for path in arguments.rows:
        splits = 3 if arguments.quick else arguments.splits
        results.append(measure(path, splits, tuple(arguments.max_error), arguments.confidence))
        if arguments.json:  # after each set: a long run that is stopped leaves what it has
            arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    print_tables(results, arguments.confidence)


def measure(path: Path, splits: int, levels: tuple[float, ...], confidence: float) -> dict[str, Any]:
    from tqdm import trange

    rows = read_rows(path)
    size = max(len(rows) // 2, min(FEWEST_CALIBRATED, len(rows) - 50))
    outcomes = [
        one_split(rows, size, seed, levels, confidence) for seed in trange(splits, desc=path.stem, disable=None)
    ]
    difference, low, high = paired_interval(outcomes, len(rows))
    return {
        "set": path.stem.removesuffix(".rows"),
        "rows": len(rows),
        "calibrated_on": size,
        "tested_on": len(rows) - size,
        "splits": splits,
        "accuracy": float(np.mean([row.correct for row in rows])),
        "levels": [asdict(level_over_splits(outcomes, at, level)) for at, level in enumerate(levels)],
        "auroc": mean(split["auroc"] for split in outcomes),
        "auroc_best_free": mean(split["auroc_free"] for split in outcomes),
        "auroc_difference": {"value": difference, "low": low, "high": high},
        "ece": mean(split["ece"] for split in outcomes),
        "brier_skill": mean(split["brier_skill"] for split in outcomes),
        "not_applicable": mean(split["not_applicable"] for split in outcomes),
        "verdicts": dict(Counter(split["verdict"] for split in outcomes)),
        "chosen": dict(Counter(split["chosen"] for split in outcomes).most_common(5)),
        "best_free": dict(Counter(split["free"] for split in outcomes).most_common(3)),
        "seconds_informational": mean(split["seconds"] for split in outcomes),
    }


def read_rows(path: Path) -> list[Any]:
    from gnuq_serve import Uncertainty
    from gnuq_serve.calibration import Row

    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        data = json.loads(line)
        if data.get("correct") is not None and data["uncertainty"]["status"] == "scored":
            optional = {
                name: data.get(name) for name in ("group", "prompt_tokens", "turns", "finish_reason", "key")
            }
            score = Uncertainty.from_dict(data["uncertainty"])
            rows.append(Row(uncertainty=score, correct=bool(data["correct"]), **optional))
    return rows


def one_split(
    rows: list[Any], size: int, seed: int, levels: tuple[float, ...], confidence: float
) -> dict[str, Any]:
    import time

    from gnuq_serve.calibration import calibrate
    from gnuq_serve.calibration.metrics import reliability

    inside, outside = split(rows, size, seed)
    calibration_rows, test_rows = [rows[at] for at in inside], [rows[at] for at in outside]
    started = time.perf_counter()
    outcome = calibrate(
        calibration_rows, max_error=levels, confidence=confidence, seed=seed, resamples=200, name="split"
    )
    seconds = time.perf_counter() - started
    applied = [
        outcome.calibration.apply(
            row.uncertainty,
            prompt_tokens=row.prompt_tokens,
            turns=row.turns,
            finish_reason=row.finish_reason,
        ).p_correct
        for row in test_rows
    ]
    # An answer that the calibration does not apply to is never answered, and left out of the comparison.
    known = np.array([p is not None for p in applied])
    p_correct = np.array([np.nan if p is None else p for p in applied])
    right = np.array([row.correct for row in test_rows])
    free = FreeSignal(calibration_rows, outcome, levels, confidence, seed)
    free_scores, free_probabilities = free.scores(test_rows), free.probabilities(test_rows)
    p, r = p_correct[known], right[known]
    base = r.mean() * (1 - r.mean())
    return {
        "outside": np.array(outside)[known],
        "p_correct": p,
        "free_scores": free_scores[known],
        "right": r,
        "auroc": auroc(p, r),
        "auroc_free": auroc(free_scores[known], r),
        "ece": sum(part.count * abs(part.mean_p - part.accuracy) for part in reliability(p, r)) / len(p),
        "brier_skill": float(1 - np.mean((p - r) ** 2) / base) if base > 0 else None,
        "not_applicable": float(1 - known.mean()),
        "verdict": outcome.verdict.earns,
        "chosen": ", ".join(outcome.fit.features) if len(outcome.fit.features) < 3 else set_name(outcome),
        "free": free.name,
        "seconds": seconds,
        "promises": [
            answered(p_correct, right, promise.threshold, promise.max_error)
            for promise in outcome.guarantee.promises
        ],
        "free_promises": [
            answered(free_probabilities, right, threshold, level)
            for threshold, level in zip(free.thresholds, levels, strict=True)
        ],
    }


def set_name(outcome: Any) -> str:
    return next(candidate.name for candidate in outcome.fit.candidates if candidate.chosen)


def split(rows: list[Any], size: int, seed: int) -> tuple[list[int], list[int]]:
    """Whole groups, drawn at random until the calibration part holds ``size`` rows."""
    groups: dict[Any, list[int]] = {}
    for at, row in enumerate(rows):
        groups.setdefault(at if row.group is None else ("group", row.group), []).append(at)
    members = list(groups.values())
    inside: list[int] = []
    outside: list[int] = []
    for at in np.random.default_rng(seed).permutation(len(members)).tolist():
        (inside if len(inside) < size else outside).extend(members[at])
    return sorted(inside), sorted(outside)


class FreeSignal:
    """What can be had without us: the free signal with the best AUROC on the calibration part.

    Its sign comes from there too. For thresholds it gets what ours gets: a logistic regression of its own, fitted
    on the same rows, and the same held-out rows.
    """

    def __init__(
        self, rows: list[Any], outcome: Any, levels: tuple[float, ...], confidence: float, seed: int
    ) -> None:
        from gnuq_serve.calibration.counts import learned_first_count
        from gnuq_serve.calibration.features import FEATURES
        from gnuq_serve.calibration.fit import fit_logistic
        from gnuq_serve.calibration.guarantee import guarantee

        right = np.array([row.correct for row in rows])
        best = (-1.0, "", 1.0)
        for name in [one.name for one in FEATURES.values() if one.kind == "free" and one.of is None]:
            values = self._read(rows, name)
            if np.isfinite(values).all():
                value = auroc(values, right)
                if value is not None:
                    best = max(best, (max(value, 1 - value), name, 1.0 if value >= 0.5 else -1.0))
        _, self.name, self.sign = best
        held = [row.index for row in outcome.held_out]
        fitted = sorted(set(range(len(rows))) - set(held))
        self._model = None
        if right[fitted].any() and not right[fitted].all():
            column = self._read(rows, self.name)[fitted][:, None]
            self._model = fit_logistic(column, [self.name], right[fitted], 1.0)
        probability = self.probabilities(rows)
        units = len({rows[at].group if rows[at].group is not None else at for at in held})
        promised = guarantee(
            probability[held],
            right[held],
            max_error=levels,
            confidence=confidence,
            groups=[rows[at].group for at in held],
            first_counts={
                level: learned_first_count(
                    probability[fitted], right[fitted], units=units, max_error=level, confidence=confidence
                )
                for level in levels
            },
            seed=seed,
        )
        self.thresholds = [promise.threshold for promise in promised.promises]

    def scores(self, rows: list[Any]) -> Any:
        """The signal itself, turned so that higher is surer."""
        return self.sign * self._read(rows, self.name)

    def probabilities(self, rows: list[Any]) -> Any:
        """Its probability of a right answer; one half for all where the rows of the fit are of one kind."""
        from gnuq_serve.calibration.fit import probabilities

        if self._model is None:
            return np.full(len(rows), 0.5)
        return probabilities(self._model, self._read(rows, self.name)[:, None])

    @staticmethod
    def _read(rows: list[Any], name: str) -> Any:
        from gnuq_serve.calibration.features import read_features

        values = [read_features(row.uncertainty, [name])[0] for row in rows]
        return np.array([np.nan if value is None else value for value in values])


def auroc(scores: Any, right: Any) -> float | None:
    from gnuq_serve.calibration.metrics import auroc as area

    return area(scores, right)


def answered(scores: Any, right: Any, threshold: float | None, level: float) -> dict[str, Any]:
    """What a threshold does on the test part; ``held`` and ``broken`` are None where nothing was answered."""
    from scipy.stats import binom

    if threshold is None:
        return {"made": False, "coverage": 0.0, "held": None, "broken": None, "error": None}
    taken = scores >= threshold  # false where there is no score
    count, errors = int(taken.sum()), int((taken & ~right).sum())
    if not count:
        return {"made": True, "coverage": 0.0, "held": None, "broken": None, "error": None}
    return {
        "made": True,
        "coverage": count / len(scores),
        "held": errors <= level * count,
        "broken": bool(binom.sf(errors - 1, count, level) < 0.05),
        "error": errors / count,
    }


def level_over_splits(outcomes: list[dict[str, Any]], at: int, level: float) -> Level:
    ours = [split["promises"][at] for split in outcomes]
    free = [split["free_promises"][at] for split in outcomes]
    covered, covered_free = mean(one["coverage"] for one in ours), mean(one["coverage"] for one in free)
    return Level(
        max_error=level,
        made=mean(one["made"] for one in ours) or 0.0,
        held=mean(one["held"] for one in ours),
        broken_beyond_chance=mean(one["broken"] for one in ours),
        coverage=covered or 0.0,
        coverage_of_free=covered_free or 0.0,
        gained=(covered or 0.0) - (covered_free or 0.0),
        test_error=mean(one["error"] for one in ours),
    )


def paired_interval(
    outcomes: list[dict[str, Any]], count: int
) -> tuple[float | None, float | None, float | None]:
    """Mean over splits of the AUROC difference, with the interval over draws of the questions."""
    from gnuq_serve.calibration.metrics import Ranking

    pairs = [
        (Ranking(one["p_correct"], one["right"]), Ranking(one["free_scores"], one["right"]), one["outside"])
        for one in outcomes
        if one["auroc"] is not None and one["auroc_free"] is not None
    ]
    if not pairs:
        return None, None, None

    def difference(weights: Any) -> float | None:
        found = []
        for ours, free, outside in pairs:
            high, low = ours.auroc(weights[outside]), free.auroc(weights[outside])
            if high is not None and low is not None:
                found.append(high - low)
        return mean(found)

    rng = np.random.default_rng(0)
    draws = [
        value
        for _ in range(RESAMPLES)
        if (value := difference(np.bincount(rng.integers(count, size=count), minlength=count).astype(float)))
        is not None
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    return difference(np.ones(count)), float(low), float(high)


def mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def print_tables(results: list[dict[str, Any]], confidence: float) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    promises = Table(title=f"Promises, confidence {confidence:.0%}; shares of splits, means over splits")
    for title in ("set", "rows", "right", "level", "made", "held on test", "broken beyond chance", "test error"):
        promises.add_column(title, justify="left" if title == "set" else "right")
    for title in ("answered", "best free signal", "gained"):
        promises.add_column(title, justify="right")
    quality = Table(title="p_correct on the test part")
    for title in (
        "set",
        "AUROC",
        "best free",
        "difference [95 %]",
        "ECE",
        "Brier skill",
        "gradient earns",
        "chosen",
    ):
        quality.add_column(title, justify="left" if title in ("set", "chosen", "gradient earns") else "right")
    for result in results:
        for at, level in enumerate(result["levels"]):
            promises.add_row(
                *((result["set"], str(result["rows"]), f"{result['accuracy']:.2f}") if at == 0 else ("", "", "")),
                f"{level['max_error']:.0%}",
                *(show(level[name], "{:.0%}") for name in ("made", "held", "broken_beyond_chance", "test_error")),
                *(show(level[name], "{:.0%}") for name in ("coverage", "coverage_of_free")),
                show(level["gained"], "{:+.1%}"),
            )
        gap = result["auroc_difference"]
        quality.add_row(
            result["set"],
            show(result["auroc"]),
            f"{show(result['auroc_best_free'])} {next(iter(result['best_free']))}",
            f"{show(gap['value'], '{:+.3f}')} [{show(gap['low'], '{:+.3f}')}, {show(gap['high'], '{:+.3f}')}]",
            show(result["ece"]),
            show(result["brier_skill"]),
            ", ".join(f"{name} {count}" for name, count in result["verdicts"].items()),
            next(iter(result["chosen"])),
        )
    console.print(promises)
    console.print(quality)


def show(value: float | None, form: str = "{:.3f}") -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    main()
