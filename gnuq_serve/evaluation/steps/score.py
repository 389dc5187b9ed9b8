"""The gradient pass: the uncertainty of the answer, as the server gives it."""

from __future__ import annotations

from collections.abc import Sequence

from gnuq_serve.evaluation.server import ModelServer
from gnuq_serve.evaluation.steps.base import Job, Result, Step

OPTIONS = ("semantic", "trace")


def score_step(options: Sequence[str]) -> Step:
    """The score with some of `OPTIONS`."""

    async def score(server: ModelServer, job: Job) -> Result:
        answer = job.results["answer"]
        wanted = dict.fromkeys(options, True)
        found = await server.score(answer["prompt_ids"], answer["answer_ids"], **wanted)
        return {"options": list(options), "uncertainty": found}

    def done(result: Result) -> bool:
        return "failure" not in result and is_scored(result) and set(options) <= set(result["options"])

    return Step(name="score", what="scores", run=score, done=done)


def is_scored(result: Result) -> bool:
    """The server had time and room for it."""
    return bool(result["uncertainty"]["status"] == "scored")
