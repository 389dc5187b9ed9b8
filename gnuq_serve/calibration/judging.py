"""A judge at work: verdicts on many answers, and how often the judge itself is wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from gnuq_serve.matching import Judge, MatchError, Reference

JUDGE_NOT_MEASURED = (
    "Right and wrong are a judge's verdicts, and the judge's own error was not measured: the promise is about "
    "its verdicts. Label some answers by hand and pass them as --judge-sample."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeQuality:
    """A judge against a person, on answers that the person labelled.

    Attributes:
        right: answers that are right, says the person.
        right_rejected: of these, how many the judge called wrong.
        wrong: answers that are wrong, says the person.
        wrong_accepted: of these, how many the judge called right. These errors are invisible to a promise.
    """

    right: int
    right_rejected: int
    wrong: int
    wrong_accepted: int

    def sentence(self, confidence: float = 0.95) -> str:
        """What was found, with exact (Clopper-Pearson) intervals."""
        accepted = _share(self.wrong_accepted, self.wrong, confidence)
        rejected = _share(self.right_rejected, self.right, confidence)
        return (
            f"Against a person's labels, the judge called right {accepted} of the wrong answers, and called "
            f"wrong {rejected} of the right ones. The promise is about its verdicts: wrong answers that it "
            "accepts come on top."
        )


def _share(count: int, total: int, confidence: float) -> str:
    if not total:
        return "none"
    from scipy.stats import binomtest

    low, high = binomtest(count, total).proportion_ci(confidence, method="exact")
    return f"{count} of {total} ({count / total:.1%}; {confidence:.0%} interval {low:.1%} to {high:.1%})"


def judge_name(judge: Judge) -> str:
    """Names model and prompt: another of either gives other verdicts."""
    return f"{judge.model}@{hashlib.sha256(judge.prompt.encode()).hexdigest()[:8]}"


def judge_all(
    judge: Judge,
    cases: Sequence[tuple[str, Reference]],
    *,
    concurrency: int = 8,
    on_verdict: Callable[[int, bool | None], None],
) -> None:
    """Ask the judge about each (answer, reference), several at a time.

    ``on_verdict`` gets the index and the verdict, or None where the judge's reply held none; it is called in
    this thread, in the order of the cases.
    """

    def verdict(case: tuple[str, Reference]) -> bool | None:
        try:
            return judge(*case)
        except MatchError:
            return None

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            for index, correct in enumerate(pool.map(verdict, cases)):
                on_verdict(index, correct)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def judge_quality(verdicts: Sequence[tuple[bool, bool]]) -> JudgeQuality:
    """Count agreement from pairs (judge's verdict, person's label)."""
    of_right = [verdict for verdict, label in verdicts if label]
    of_wrong = [verdict for verdict, label in verdicts if not label]
    return JudgeQuality(
        right=len(of_right),
        right_rejected=of_right.count(False),
        wrong=len(of_wrong),
        wrong_accepted=of_wrong.count(True),
    )
