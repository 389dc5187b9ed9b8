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

_Part = TypeVar("_Part", "Normalized", "Signals", "Trace", "Uncertainty")


def bernoulli_variance(log_probability: float) -> float:
    """``p (1 - p)`` from ``log p`` (natural logarithm, at most 0), accurate at both ends."""
    return math.exp(log_probability) * abs(math.expm1(log_probability))  # abs, not minus: no -0.0


def log_epistemic(log_probability: float, log_grad_norm_sq: float) -> float:
    """``log ||grad S||^2 = 2 l + log ||grad l||^2`` (arXiv:2603.29466, in the log domain)."""
    return 2.0 * log_probability + log_grad_norm_sq


def finite_or_none(value: float | None) -> float | None:
    """The value itself where it is a finite number, else None: JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


def log_or_none(value: float | None) -> float | None:
    """Natural logarithm, or None where it is not finite."""
    return math.log(value) if value is not None and value > 0 and math.isfinite(value) else None


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
    """What else the same pass gives; entropies in nats, logarithms natural.

    Gradients at the prompt do not exist in ``answer_only``, and the last four are there where asked for
    (``semantic``); else they are None.

    Attributes:
        min_token_log_probability: lowest ``log p_t``.
        max_entropy, first_entropy: of the tokens' predictive distributions.
        log_input_grad_norm_sq: ``log sum_p ||dl/de_p||^2`` over the prompt's input embeddings.
        log_hidden_grad: ``log`` of the mean of ``||dl/dh||`` over the hidden states of the model's upper half.
        hidden_position: over which prompt positions that mean, and SemGrad's, goes: ``"mean"`` (all), or an index
            from the prompt's end (``"-1"``: its last token).
        semgrad, exgrad, paragrad, hybridgrad: arXiv:2605.04638; see ``gnuq_serve.gradnorm.semantic``.
    """

    min_token_log_probability: float | None = None
    max_entropy: float | None = None
    first_entropy: float | None = None
    log_input_grad_norm_sq: float | None = None
    log_hidden_grad: float | None = None
    hidden_position: str | None = None
    semgrad: float | None = None
    exgrad: float | None = None
    paragrad: float | None = None
    hybridgrad: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The estimate token by token (arXiv:2605.07776), T values each.

    Attributes:
        entropy: of the predictive distribution, in nats.
        aleatoric: ``p_t (1 - p_t)``.
        epistemic: ``||grad_theta p_t||^2 = p_t^2 ||grad_theta log p_t||^2``.
    """

    entropy: tuple[float | None, ...]
    aleatoric: tuple[float | None, ...]
    epistemic: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """The uncertainty of one answer, or the reason why there is none.

    Every number is finite or None. Logarithms are natural, entropies in nats. ``log_probability`` is ``l``,
    ``entropy`` the mean over the answer's tokens, ``log_grad_norm_sq`` is ``log ||grad_theta l||^2`` over all
    parameters. ``p_correct``, ``decision`` and ``calibration`` stay None until a calibration or a policy
    fills them in. ``seconds`` is the wall time from asking for the score to having it. ``audit``: the answer was
    drawn at random to be labelled. ``withheld``: the server's gate put another text in the answer's place, since
    it is ``uncertain`` or ``unscored``. Both are absent from the JSON where there is nothing to say.
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
    trace: Trace | None = None
    tool_call: bool = False
    warnings: tuple[str, ...] = ()
    fingerprint: str | None = None
    p_correct: float | None = None
    decision: str | None = None
    calibration: str | None = None
    seconds: float | None = None
    audit: bool = False
    withheld: str | None = None

    @classmethod
    def scored(
        cls,
        *,
        token_log_probabilities: Sequence[float],
        token_entropies: Sequence[float],
        grad_norm_sq: float,
        token_grad_norm_sq: Sequence[float] | None = None,
        prompt_signals: Mapping[str, Any] | None = None,
        mode: Mode = "exact",
        fingerprint: str | None = None,
        warnings: Sequence[str] = (),
        seconds: float | None = None,
    ) -> Uncertainty:
        """The estimate from what one pass measured.

        Args:
            token_log_probabilities: ``log p_t`` for each of the ``T`` answer tokens, natural logarithm.
            token_entropies: entropy of each predictive distribution, in nats, ``T`` of them.
            grad_norm_sq: ``||grad_theta l||^2`` over all parameters.
            token_grad_norm_sq: ``||grad_theta log p_t||^2`` of each token, for the trace.
            prompt_signals: entries of ``signals`` that come from gradients at hidden states.
            mode: how the pass was done.
            fingerprint: which model and settings the numbers belong to.
            warnings: what a reader of the numbers should know.
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
                **(prompt_signals or {}),
            ),
            trace=None
            if token_grad_norm_sq is None
            else _trace(token_log_probabilities, token_entropies, token_grad_norm_sq),
            warnings=tuple(warnings),
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
            "trace": _read_trace(data.get("trace")),
            "warnings": tuple(data.get("warnings") or ()),
        }
        return _read(cls, {**data, **parts})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: plain dicts, lists, strings, booleans, finite numbers and None."""
        data = dataclasses.asdict(self)
        data["warnings"] = list(self.warnings)
        if self.trace is not None:
            data["trace"] = {name: list(values) for name, values in data["trace"].items()}
        if self.reason is None:
            del data["reason"]
        if not self.audit:
            del data["audit"]
        if self.withheld is None:
            del data["withheld"]
        return data

    def replace(self, **changes: Any) -> Uncertainty:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def _read(cls: type[_Part], data: Mapping[str, Any] | None) -> _Part:
    known = {f.name for f in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in (data or {}).items() if name in known})


def _read_trace(data: Mapping[str, Any] | None) -> Trace | None:
    if data is None:
        return None
    return Trace(**{f.name: tuple(data.get(f.name) or ()) for f in dataclasses.fields(Trace)})


def _trace(
    log_probabilities: Sequence[float], entropies: Sequence[float], grad_norm_sq: Sequence[float]
) -> Trace:
    joint = [
        0.0 if g == 0 else exp_or_none(log_epistemic(lp, math.log(g))) if g > 0 and math.isfinite(g) else None
        for lp, g in zip(log_probabilities, grad_norm_sq, strict=True)
    ]
    return Trace(
        entropy=tuple(finite_or_none(entropy) for entropy in entropies),
        aleatoric=tuple(bernoulli_variance(lp) for lp in log_probabilities),
        epistemic=tuple(joint),
    )
