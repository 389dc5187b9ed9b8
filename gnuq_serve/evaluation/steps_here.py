"""Steps in this process, after the server's: hidden states, and clusters by an encoder or an NLI model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnuq_serve.calibration.collecting import Progress
from gnuq_serve.evaluation.steps import HERE, Job, Result
from gnuq_serve.evaluation.working_file import EvaluationFile


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
) -> dict[str, int]:
    """Do the needed steps; returns the bytes of each model that was loaded."""
    sizes = {}
    for name in HERE:
        asked = [job for job in jobs if name in needed and _applies(name, job)]
        by = models.name_of(name)
        todo = [job for job in asked if job.results.get(name, {}).get("by") != by]
        if not todo:
            continue
        sizes[name], run = _loaded(name, models)
        bar = progress(name, len(asked) - len(todo), len(asked))
        for job in todo:
            start = time.perf_counter()
            result = run(job)
            result["seconds"] = time.perf_counter() - start
            work.add(job.set_name, job.case.key, name, {**result, "bytes": sizes[name], "by": by})
            bar()
    return sizes


def _applies(name: str, job: Job) -> bool:
    if "failure" in job.results.get("answer", {"failure": ""}):
        return False
    return name in ("hidden", "positions") or "texts" in job.results.get("samples", {})


def _loaded(name: str, models: Models) -> tuple[int, Callable[[Job], Result]]:
    if name in ("hidden", "positions"):
        from gnuq_serve.evaluation.local_model import LocalModel

        model = LocalModel(str(models.local), dtype=models.local_dtype)
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
