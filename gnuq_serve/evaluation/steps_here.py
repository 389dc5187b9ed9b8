"""Steps in this process, after the server's: hidden states, and clusters by an encoder or an NLI model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnuq_serve.calibration.collecting import Progress
from gnuq_serve.evaluation.steps import HERE, Job, Result
from gnuq_serve.evaluation.working_file import EvaluationFile

if TYPE_CHECKING:
    from gnuq_serve.evaluation.local_model import LocalModel


_LOCAL = ("hidden", "positions")  # steps that read the same weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Folders of the models that steps here use; None: there is none."""

    local: str | None = None
    local_dtype: str = "auto"
    encoder: str | Path | None = None
    same_meaning: float = 0.8
    nli: str | None = None

    @property
    def available(self) -> tuple[str, ...]:
        """Steps that can be done."""
        have = {"hidden": self.local, "positions": self.local, "encoder": self.encoder, "nli": self.nli}
        return tuple(name for name in HERE if have[name] is not None)

    def name_of(self, step: str) -> str:
        """What a step's results depend on: with another model it is done again."""
        if step == "encoder":
            return f"{self.encoder}, {self.same_meaning:g}"
        return str(self.nli if step == "nli" else self.local)


def run_here(
    jobs: Sequence[Job], needed: Collection[str], models: Models, work: EvaluationFile, progress: Progress
) -> None:
    """Do the needed steps."""

    @lru_cache(maxsize=1)
    def local() -> LocalModel:
        from gnuq_serve.evaluation.local_model import LocalModel

        return LocalModel(str(models.local), dtype=models.local_dtype)

    for name in HERE:
        asked = [job for job in jobs if name in needed and _applies(name, job)]
        by = models.name_of(name)
        todo = [job for job in asked if job.results.get(name, {}).get("by") != by]
        if not todo:
            continue
        if name not in _LOCAL:
            local.cache_clear()  # make room for the next model
        size, run = _loaded(name, models, local)
        bar = progress(name, len(asked) - len(todo), len(asked))
        for job in todo:
            start = time.perf_counter()
            result = run(job)
            result["seconds"] = time.perf_counter() - start
            work.add(job.set_name, job.case.key, name, {**result, "bytes": size, "by": by})
            bar()


def _applies(name: str, job: Job) -> bool:
    if "failure" in job.results.get("answer", {"failure": ""}):
        return False
    return name in _LOCAL or "texts" in job.results.get("samples", {})


def _loaded(name: str, models: Models, local: Callable[[], LocalModel]) -> tuple[int, Callable[[Job], Result]]:
    if name in _LOCAL:
        model = local()
        measure = model.measure if name == "hidden" else model.positions().measure

        def read(job: Job) -> Result:
            answer = job.results["answer"]
            return measure(answer["prompt_ids"], answer["answer_ids"])

        return model.bytes, read
    judge: Any
    if name == "encoder":
        from gnuq_serve.evaluation.encoder import Encoder

        judge = Encoder(str(models.encoder), threshold=models.same_meaning)
    else:
        from gnuq_serve.evaluation.nli import Entailment

        judge = Entailment(str(models.nli))

    def compare(job: Job) -> Result:
        results = job.results
        found: Result = judge.compare(
            job.case.question.text, results["answer"]["text"], results["samples"]["texts"]
        )
        return found

    return judge.bytes, compare
