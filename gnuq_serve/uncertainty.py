"""The estimate: what one gradient pass says about one answer.

With ``p_t`` the probability of answer token ``t``, ``l = sum_t log p_t`` and ``S = exp(l)`` the probability
of the answer (Gruenefeld, Frellsen, Hardmeier, arXiv:2603.29466):

* aleatoric ``= S (1 - S)``, the variance of the event "this answer" at the trained weights;
* epistemic ``= ||grad S||^2``, its variance over the weights to first order, with covariance ``I``.

Long answers underflow, so ``l`` is differentiated and never ``S``: ``log epistemic = 2 l + log ||grad l||^2``.
The same gradient serves the length-normalised probability ``P = exp(l / T)``:
``||grad P||^2 = P^2 ||grad l||^2 / T^2``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

Status = Literal["scored", "pending", "skipped", "failed"]
Mode = Literal["exact", "answer_only"]

_Part = TypeVar("_Part", "Normalized", "Signals", "Uncertainty")


def bernoulli_variance(log_probability: float) -> float:
    """``p (1 - p)`` from ``log p`` (natural logarithm, at most 0), accurate at both ends."""
    return math.exp(log_probability) * abs(math.expm1(log_probability))  # abs, not minus: no -0.0


def log_epistemic(log_probability: float, log_grad_norm_sq: float) -> float:
    """``log ||grad S||^2 = 2 l + log ||grad l||^2`` (arXiv:2603.29466, in the log domain)."""
    return 2.0 * log_probability + log_grad_norm_sq


def finite_or_none(value: float | None) -> float | None:
    """The value itself where it is a finite number, else None: JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


def exp_or_none(value: float) -> float | None:
    """``exp(value)``, or None where that is beyond a double."""
    try:
        return finite_or_none(math.exp(value))
    except OverflowError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalized:
    """The estimate for ``P = exp(l / T)``, the geometric mean of the token probabilities."""

    probability: float | None = None
    aleatoric: float | None = None
    epistemic: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What else the same pass gives; entropies in nats, logarithms natural."""

    min_token_log_probability: float | None = None
    max_entropy: float | None = None
    first_entropy: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """The uncertainty of one answer, or the reason why there is none.

    Every number is finite or None. Logarithms are natural, entropies in nats. ``log_probability`` is ``l``,
    ``entropy`` the mean over the answer's tokens, ``log_grad_norm_sq`` is ``log ||grad_theta l||^2`` over all
    parameters. ``p_correct``, ``decision`` and ``calibration`` stay None until a calibration or a policy
    fills them in. ``seconds`` is the wall time from asking for the score to having it.
    """

    id: str | None = None
    status: Status
    reason: str | None = None
    mode: Mode | None = None
    span: str | None = None
    tokens: int | None = None
    log_probability: float | None = None
    entropy: float | None = None
    aleatoric: float | None = None
    epistemic: float | None = None
    log_epistemic: float | None = None
    log_grad_norm_sq: float | None = None
    normalized: Normalized = field(default_factory=Normalized)
    signals: Signals = field(default_factory=Signals)
    trace: None = None
    tool_call: bool = False
    warnings: tuple[str, ...] = ()
    fingerprint: str | None = None
    p_correct: float | None = None
    decision: str | None = None
    calibration: str | None = None
    seconds: float | None = None

    @classmethod
    def scored(
        cls,
        *,
        token_log_probabilities: Sequence[float],
        token_entropies: Sequence[float],
        grad_norm_sq: float,
        mode: Mode = "exact",
        fingerprint: str | None = None,
        seconds: float | None = None,
    ) -> Uncertainty:
        """The estimate from what one pass measured.

        Args:
            token_log_probabilities: ``log p_t`` for each of the ``T`` answer tokens, natural logarithm.
            token_entropies: entropy of each predictive distribution, in nats, ``T`` of them.
            grad_norm_sq: ``||grad_theta l||^2`` over all parameters.
            mode: how the pass was done.
            fingerprint: which model and settings the numbers belong to.
            seconds: wall time of the score.

        Raises:
            ValueError: no tokens, or the two lists differ in length.
        """
        tokens = len(token_log_probabilities)
        if tokens == 0 or tokens != len(token_entropies):
            raise ValueError(
                f"token_log_probabilities ({tokens}) and token_entropies ({len(token_entropies)}) "
                "must have the same length, at least 1"
            )
        total = math.fsum(token_log_probabilities)
        if not (math.isfinite(total) and math.isfinite(grad_norm_sq)):
            return cls.failed("the model's log-probability or gradient is not finite (overflow in its dtype?)")
        mean = total / tokens
        # A gradient of exactly zero has no logarithm; its square norm is still a number.
        log_norm_sq = math.log(grad_norm_sq) if grad_norm_sq > 0 else None
        joint = None if log_norm_sq is None else log_epistemic(total, log_norm_sq)
        per_token = None if log_norm_sq is None else log_epistemic(mean, log_norm_sq) - 2 * math.log(tokens)
        return cls(
            status="scored",
            mode=mode,
            span="answer",
            tokens=tokens,
            log_probability=total,
            entropy=finite_or_none(math.fsum(token_entropies) / tokens),
            aleatoric=bernoulli_variance(total),
            epistemic=0.0 if joint is None else exp_or_none(joint),
            log_epistemic=joint,
            log_grad_norm_sq=log_norm_sq,
            normalized=Normalized(
                probability=math.exp(mean),
                aleatoric=bernoulli_variance(mean),
                epistemic=0.0 if per_token is None else exp_or_none(per_token),
            ),
            signals=Signals(
                min_token_log_probability=min(token_log_probabilities),
                max_entropy=finite_or_none(max(token_entropies)),
                first_entropy=finite_or_none(token_entropies[0]),
            ),
            fingerprint=fingerprint,
            seconds=seconds,
        )

    @classmethod
    def failed(cls, reason: str) -> Uncertainty:
        """No score although one was wanted, with the reason."""
        return cls(status="failed", reason=reason)

    @classmethod
    def skipped(cls, reason: str) -> Uncertainty:
        """No score because none can be given for this kind of answer, with the reason."""
        return cls(status="skipped", reason=reason)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Uncertainty:
        """Read the JSON form; fields that a newer server adds are ignored.

        Raises:
            ValueError: ``status`` is missing or unknown.
        """
        if data.get("status") not in get_args(Status):
            raise ValueError(
                f"status is {data.get('status')!r}; expected scored, pending, skipped or failed: "
                "is this the `uncertainty` object of a response?"
            )
        parts = {
            "normalized": _read(Normalized, data.get("normalized")),
            "signals": _read(Signals, data.get("signals")),
            "warnings": tuple(data.get("warnings") or ()),
        }
        return _read(cls, {**data, **parts})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: plain dicts, lists, strings, booleans, finite numbers and None."""
        data = dataclasses.asdict(self)
        data["warnings"] = list(self.warnings)
        if self.reason is None:
            del data["reason"]
        return data

    def replace(self, **changes: Any) -> Uncertainty:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def _read(cls: type[_Part], data: Mapping[str, Any] | None) -> _Part:
    known = {f.name for f in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in (data or {}).items() if name in known})
