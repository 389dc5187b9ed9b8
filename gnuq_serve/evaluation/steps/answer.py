"""The answer: greedy, or the likeliest of the choices."""

from __future__ import annotations

import asyncio
import math

from gnuq_serve.evaluation.server import Ids, ModelServer
from gnuq_serve.evaluation.steps.base import Job, Result, Step


async def _answer(server: ModelServer, job: Job) -> Result:
    prompt = job.prompter.question(job.case)
    ids = await server.prompt_ids(prompt)
    if job.case.choices:
        return {"prompt_ids": ids, **await _likeliest(server, job, ids)}
    (found,) = await server.generate(ids, max_tokens=job.generation.max_tokens, stop=prompt.stop)
    return {
        "prompt_ids": ids,
        "answer_ids": found.ids,
        "text": found.text.strip(),
        "finish_reason": found.finish_reason,
    }


async def _likeliest(server: ModelServer, job: Job, ids: Ids) -> Result:
    """The choice with the highest probability ``S``, its end included."""
    prompt, texts = job.prompter.question(job.case), job.prompter.answers_of(job.case)
    answers = [await server.answer_ids(prompt, text) for text in texts]
    logs = await asyncio.gather(*(server.log_probabilities(ids, answer) for answer in answers))
    totals = [math.fsum(log) for log in logs]
    best = max(range(len(totals)), key=totals.__getitem__)
    return {
        "answer_ids": answers[best],
        "text": texts[best],
        "finish_reason": "choice",
        "choice": best,
        "choice_log_probabilities": totals,
    }


ANSWER = Step(name="answer", what="answers", run=_answer)
