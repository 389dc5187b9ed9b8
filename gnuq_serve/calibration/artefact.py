"""The file that a calibration leaves: from a raw uncertainty to ``p_correct`` and a decision. numpy is enough."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from gnuq_serve.calibration.features import FEATURES, read_features
from gnuq_serve.calibration.guarantee import BandPoint, Promise, check_levels, loosest
from gnuq_serve.uncertainty import Uncertainty

SCHEMA = "gnuq-serve/calibration"
SCHEMA_VERSION = 1


class CalibrationError(ValueError):
    """A calibration file that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class LogisticScore:
    """``p_correct = 1 / (1 + exp(-z))``, ``z = intercept + sum_i weight_i (x_i - mean_i) / scale_i``.

    ``features`` names the ``x_i`` (`gnuq_serve.calibration.features.FEATURES`).
    """

    features: tuple[str, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]
    weights: tuple[float, ...]
    intercept: float

    def probability(self, values: Sequence[float]) -> float:
        """``p_correct`` from one value for each feature, in their order."""
        terms = [
            weight * (value - mean) / scale
            for value, mean, scale, weight in zip(values, self.means, self.scales, self.weights, strict=True)
        ]
        z = math.fsum([self.intercept, *terms])
        return 1.0 / (1.0 + math.exp(-z)) if z >= 0.0 else (low := math.exp(max(z, -700.0))) / (1.0 + low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requires:
    """What a score must bring: the gradient pass, and its second backward pass (``"semantic": true``)."""

    gradient: bool
    semantic: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The range of the calibration's rows, ends included; None: its rows did not say.

    An answer outside has no ``p_correct``: nothing is known there.
    """

    answer_tokens: tuple[int, int] | None = None
    prompt_tokens: tuple[int, int] | None = None
    turns: tuple[int, int] | None = None
    finish_reasons: tuple[str, ...] | None = None
    tool_calls: bool = False

    def outside(
        self,
        uncertainty: Uncertainty,
        *,
        prompt_tokens: int | None,
        turns: int | None,
        finish_reason: str | None,
    ) -> list[str]:
        """Why an answer lies outside, one phrase for each part; what is None is not checked."""
        phrases = []
        for name, value, ends in (
            ("answer", uncertainty.tokens, self.answer_tokens),
            ("prompt", prompt_tokens, self.prompt_tokens),
        ):
            if value is not None and ends is not None and not ends[0] <= value <= ends[1]:
                phrases.append(f"{name} of {value} tokens, seen {ends[0]} to {ends[1]}")
        if turns is not None and self.turns is not None and not self.turns[0] <= turns <= self.turns[1]:
            phrases.append(f"{turns} turns, seen {self.turns[0]} to {self.turns[1]}")
        if finish_reason is not None and self.finish_reasons and finish_reason not in self.finish_reasons:
            phrases.append(f"finish_reason {finish_reason!r}, seen {', '.join(self.finish_reasons)}")
        if uncertainty.tool_call and not self.tool_calls:
            phrases.append("a tool call, seen none")
        return phrases


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What the calibration rests on: counts of rows, and quality of ``p_correct`` on held-out rows."""

    rows: int
    fit_rows: int
    held_out_rows: int
    held_out_units: int
    accuracy: float
    auroc: float | None
    ece: float
    brier_skill: float | None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Turns an uncertainty into ``p_correct`` and a decision that keeps a promised share of errors.

    A promise covers scored answers, inside of the range seen, to questions drawn like those calibrated on,
    under the same fingerprint. It does not cover skipped or failed scores, thresholds set by hand, answers of the
    model escalated to, or asking again until an answer passes.

    Args:
        name: chosen by the user.
        model: the probability of being correct.
        confidence: of the promises, over the draw of the held-out rows.
        promises: one for each level that was named in advance; the first is the default.
        band: thresholds that may be picked after looking, for any level.
        seen: the range of the rows.
        fingerprint: named parts of what was scored and how (``scorer``, ``mode``, ``chat_template``, ...).
        data: what it rests on.
        reference_scores: a sample of ``p_correct`` on held-out rows, ascending, to compare live scores with.
    """

    name: str
    model: LogisticScore
    confidence: float
    promises: tuple[Promise, ...]
    band: tuple[BandPoint, ...]
    seen: Seen
    fingerprint: Mapping[str, str]
    data: Data
    reference_scores: tuple[float, ...]

    @cached_property
    def id(self) -> str:
        """``name@hash`` with four hexadecimal digits of the content."""
        content = json.dumps(self._content(), sort_keys=True, allow_nan=False)
        return f"{self.name}@{hashlib.sha256(content.encode()).hexdigest()[:4]}"

    @property
    def requires(self) -> Requires:
        """What its features need."""
        kinds = {FEATURES[name].kind for name in self.model.features}
        return Requires(gradient=bool(kinds & {"gradient", "semantic"}), semantic="semantic" in kinds)

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels that were named in advance."""
        return tuple(promise.max_error for promise in self.promises)

    def threshold_for(self, max_error: float | None = None) -> float | None:
        """Lowest ``p_correct`` to answer at, or None where nothing keeps the level.

        A level named in advance has its own threshold; any other one is read from the band, which is
        stricter and stays valid although the level was picked after looking.

        Args:
            max_error: share of errors among answered questions; None: the first level named in advance.

        Raises:
            ValueError: the level is outside (0, 1).
        """
        level = self.levels[0] if max_error is None else max_error
        check_levels([level], self.confidence)
        for promise in self.promises:
            if math.isclose(promise.max_error, level, rel_tol=1e-9):
                return promise.threshold
        point = loosest(self.band, level)
        return None if point is None else point.threshold

    def why_none(self, max_error: float | None = None) -> str:
        """What to say where `threshold_for` gives None: the level, and the best that the data supports."""
        level = self.levels[0] if max_error is None else max_error
        best = min(self.band, key=lambda point: (point.upper, -point.answered), default=None)
        supports = (
            "it supports no level at all"
            if best is None or best.upper >= 1.0
            else f"the best that its data supports is {best.upper:.2f} at {best.share:.0%} answered"
        )
        by = " by the test fixed in advance" if best is not None and best.upper <= level else ""
        return f"no threshold of calibration {self.id} keeps errors under {level:.3g}{by}; {supports}"

    def apply(
        self,
        uncertainty: Uncertainty,
        *,
        prompt_tokens: int | None = None,
        turns: int | None = None,
        finish_reason: str | None = None,
        max_error: float | None = None,
        parts: Mapping[str, str] | None = None,
    ) -> Uncertainty:
        """The uncertainty with ``p_correct``, ``decision`` and ``calibration`` filled in.

        An answer that is not scored comes back as it is. Where the calibration does not apply (another
        fingerprint, outside of the range seen, a signal missing) raw numbers stay, the three are None, and
        a warning names each part that differs.

        Args:
            uncertainty: as scored or as served.
            prompt_tokens: length of the prompt; None: not checked. Likewise ``turns`` and ``finish_reason``.
            turns: messages of the user in the prompt.
            finish_reason: why the answer ended.
            max_error: the level that decides; None: the first level named in advance.
            parts: what the caller knows of the fingerprint beside the uncertainty's own.

        Raises:
            ValueError: ``max_error`` is outside (0, 1).
        """
        threshold = self.threshold_for(max_error)
        if uncertainty.status != "scored":
            return uncertainty
        reasons = self._differing(uncertainty, parts or {})
        reasons += self.seen.outside(
            uncertainty, prompt_tokens=prompt_tokens, turns=turns, finish_reason=finish_reason
        )
        values = read_features(uncertainty, self.model.features)
        missing = [name for name, value in zip(self.model.features, values, strict=True) if value is None]
        if missing:
            reasons.append(f"the score lacks {', '.join(missing)}{self._remedy(missing)}")
        if reasons:
            warning = f"calibration {self.id} does not apply: {'; '.join(reasons)}"
            return _warned(uncertainty.replace(p_correct=None, decision=None, calibration=None), warning)
        p_correct = self.model.probability([value for value in values if value is not None])
        decided = uncertainty.replace(
            p_correct=p_correct,
            decision="answer" if threshold is not None and p_correct >= threshold else "abstain",
            calibration=self.id,
        )
        return decided if threshold is not None else _warned(decided, self.why_none(max_error))

    def _differing(self, uncertainty: Uncertainty, parts: Mapping[str, str]) -> list[str]:
        found = {**parts, **parts_of(uncertainty)}
        return [
            f"{name} is {found[name]}, calibrated on {bound}"
            for name, bound in self.fingerprint.items()
            if name in found and found[name] != bound
        ]

    def _remedy(self, missing: Sequence[str]) -> str:
        kinds = {FEATURES[name].kind for name in missing}
        if "semantic" in kinds:
            return ' (ask with "semantic": true)'
        return " (it needs the gradient pass, mode exact)" if "gradient" in kinds else ""

    def save(self, path: str | Path) -> None:
        """Write the file: UTF-8 JSON, one line for each part, in an order meant for reading."""
        content = {"schema": SCHEMA, "version": SCHEMA_VERSION, "id": self.id, **self._content()}
        parts = [f" {json.dumps(name)}: {_readable(name, value)}" for name, value in content.items()]
        Path(path).write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote.

        Raises:
            CalibrationError: it cannot be read, is no calibration, is of a later version, or was changed.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise CalibrationError(f"{path}: {error.strerror}") from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CalibrationError(f"{path}: not JSON ({error}); make it again with `calibrate`") from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise CalibrationError(f'{path}: not a calibration file: "schema" is not {SCHEMA!r}')
        if content.get("version") != SCHEMA_VERSION:
            raise CalibrationError(
                f"{path}: version {content.get('version')!r} of the file format; this gnuq-serve reads "
                f"version {SCHEMA_VERSION}: install the gnuq-serve that wrote it, or calibrate again"
            )
        try:
            calibration = cls._from_content(content)
            unchanged = calibration.id == content.get("id")
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            what = f"{type(error).__name__}: {error}"
            raise CalibrationError(f"{path}: damaged ({what}); make it again with `calibrate`") from error
        if not unchanged:
            raise CalibrationError(
                f"{path}: the content is not that of {content.get('id')!r}: damaged, or edited by hand, "
                "and then its promises are void; make it again with `calibrate`"
            )
        return calibration

    def _content(self) -> dict[str, Any]:
        model = self.model
        return {
            "name": self.name,
            "confidence": self.confidence,
            "promises": [dataclasses.asdict(promise) for promise in self.promises],
            "requires": dataclasses.asdict(self.requires),
            "seen": dataclasses.asdict(self.seen),
            "fingerprint": dict(self.fingerprint),
            "model": {
                "intercept": model.intercept,
                "features": [
                    {"name": name, "mean": mean, "scale": scale, "weight": weight}
                    for name, mean, scale, weight in zip(
                        model.features, model.means, model.scales, model.weights, strict=True
                    )
                ],
            },
            "data": dataclasses.asdict(self.data),
            "band": [dataclasses.asdict(point) for point in self.band],
            "reference_scores": list(self.reference_scores),
        }

    @classmethod
    def _from_content(cls, content: Mapping[str, Any]) -> Self:
        features = content["model"]["features"]
        unknown = [entry["name"] for entry in features if entry["name"] not in FEATURES]
        if unknown:
            raise ValueError(f"unknown features {', '.join(map(str, unknown))}")
        if not content["promises"]:
            raise ValueError("no promises")
        seen: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content["seen"].items()
        }
        return cls(
            name=content["name"],
            model=LogisticScore(
                features=tuple(entry["name"] for entry in features),
                means=tuple(float(entry["mean"]) for entry in features),
                scales=tuple(float(entry["scale"]) for entry in features),
                weights=tuple(float(entry["weight"]) for entry in features),
                intercept=float(content["model"]["intercept"]),
            ),
            confidence=float(content["confidence"]),
            promises=tuple(Promise(**promise) for promise in content["promises"]),
            band=tuple(BandPoint(**point) for point in content["band"]),
            seen=Seen(**seen),
            fingerprint=dict(content["fingerprint"]),
            data=Data(**content["data"]),
            reference_scores=tuple(float(score) for score in content["reference_scores"]),
        )


def parts_of(uncertainty: Uncertainty) -> dict[str, str]:
    """The parts of the fingerprint that every uncertainty carries: ``scorer``, ``mode``, ``span``."""
    parts = {"scorer": uncertainty.fingerprint, "mode": uncertainty.mode, "span": uncertainty.span}
    return {name: value for name, value in parts.items() if value is not None}


def _warned(uncertainty: Uncertainty, warning: str) -> Uncertainty:
    if warning in uncertainty.warnings:
        return uncertainty
    return uncertainty.replace(warnings=(*uncertainty.warnings, warning))


def _readable(name: str, value: Any) -> str:
    if name == "reference_scores":
        return json.dumps(value, allow_nan=False)
    if isinstance(value, list):  # a table: one line for each entry
        return "[\n" + ",\n".join(f"  {json.dumps(entry, allow_nan=False)}" for entry in value) + "\n ]"
    return json.dumps(value, allow_nan=False, ensure_ascii=False)
