"""What a method is: uncertainties for a list of answers (higher: less certain), and what it pays for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gnuq_serve.calibration.features import FEATURES
from gnuq_serve.evaluation.answered import Answered

Values = list[float | None]


@dataclass(frozen=True, slots=True)
class Setting:
    """What methods can be told: the prior variance of `combined_sum`, and the seed of cross-fitting's folds."""

    sigma_squared: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to say how uncertain an answer is.

    Attributes:
        name: stable snake case.
        title: what it is, in a few words, with its source.
        needs: steps whose results it reads, see `gnuq_serve.evaluation.steps`.
        pays: steps that it would cost a server that has only the answer and its logprobs; empty: free.
        supervised: it is fitted on labels, each answer's value by a fit on other answers.
        values: uncertainties of ``n`` answers, None where there is none.
    """

    name: str
    title: str
    needs: tuple[str, ...] = ("score",)
    pays: tuple[str, ...] = ()
    supervised: bool = False
    values: Callable[[Sequence[Answered], Setting], Values]


def each(read: Callable[[Answered], float | None]) -> Callable[[Sequence[Answered], Setting], Values]:
    """The values of a method that looks at one answer at a time."""
    return lambda answers, _setting: [read(answer) for answer in answers]


def of_feature(name: str, title: str, *, feature: str, sign: float = 1.0, pays: tuple[str, ...] = ()) -> Method:
    """A signal of `gnuq_serve.calibration.features` by itself; ``sign``: -1 where a low one is uncertain."""
    read = FEATURES[feature].read

    def value(answer: Answered) -> float | None:
        found = read(answer.uncertainty)
        return None if found is None else sign * found

    return Method(name=name, title=title, pays=pays, values=each(value))


def doubt(step: str, title: str) -> Method:
    """``1 - p``, p the probability of being right that a step says; the method has the step's name."""

    def value(answer: Answered) -> float | None:
        p = answer.result(step, "p")
        return None if p is None else 1.0 - p

    return Method(name=step, title=title, needs=("score", step), pays=(step,), values=each(value))


def named(methods: Iterable[Method]) -> dict[str, Method]:
    """By name.

    Raises:
        ValueError: two of the same name.
    """
    found: dict[str, Method] = {}
    for method in methods:
        if method.name in found:
            raise ValueError(f"two methods are called {method.name}")
        found[method.name] = method
    return found
