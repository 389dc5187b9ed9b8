"""What is measured on each question, one step after the other, each kept as soon as it is done."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gnuq_serve.evaluation.prompts import Prompter
from gnuq_serve.evaluation.question_sets import Case
from gnuq_serve.evaluation.server import ModelServer

Result = dict[str, Any]
Results = Mapping[str, Result]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How answers and samples are generated."""

    max_tokens: int = 32
    samples: int = 10
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One question on its way: ``results`` holds what earlier steps gave."""

    set_name: str
    case: Case
    prompter: Prompter
    generation: Generation
    results: Results


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that a server is asked about each question.

    Attributes:
        name: under which its result is kept.
        what: for the progress bar.
        run: asks it.
        done: the kept result suffices.
        applies: it is asked about this question at all.
    """

    name: str
    what: str
    run: Callable[[ModelServer, Job], Awaitable[Result]]
    done: Callable[[Result], bool] = lambda result: "failure" not in result
    applies: Callable[[Case], bool] = lambda _case: True
