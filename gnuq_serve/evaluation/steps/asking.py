"""Questions about the answer: is it true, how sure are you, and what else would you say?"""

from __future__ import annotations

import math

from gnuq_serve.evaluation.prompts import TRUE_FALSE, read_percentage
from gnuq_serve.evaluation.server import ModelServer
from gnuq_serve.evaluation.steps.base import Job, Result, Step

_LONGEST_PERCENTAGE = 12  # tokens; "95%." has five


async def _p_true(server: ModelServer, job: Job) -> Result:
    prompt = job.prompter.p_true(job.case, job.results["answer"]["text"])
    words = [await server.word_id(prompt, word) for word in TRUE_FALSE]
    true, false = await server.next_token(await server.prompt_ids(prompt), words)
    # Of both words; the model may well say a third.
    return {"p": 1.0 / (1.0 + math.exp(min(false - true, 700.0))), "mass": math.exp(true) + math.exp(false)}


async def _verbalized(server: ModelServer, job: Job) -> Result:
    prompt = job.prompter.verbalized(job.case, job.results["answer"]["text"])
    ids = await server.prompt_ids(prompt)
    (found,) = await server.generate(ids, max_tokens=_LONGEST_PERCENTAGE, stop=prompt.stop)
    return {"text": found.text, "p": read_percentage(found.text)}


async def _samples(server: ModelServer, job: Job) -> Result:
    how = job.generation
    found = await server.generate(
        job.results["answer"]["prompt_ids"],
        max_tokens=how.max_tokens,
        stop=job.prompter.question(job.case).stop,
        temperature=how.temperature,
        n=how.samples,
        seed=how.seed,
    )
    return {"texts": [one.text.strip() for one in found]}


P_TRUE = Step(name="p_true", what="P(True)", run=_p_true)
VERBALIZED = Step(name="verbalized", what="stated confidence", run=_verbalized)
# Choices have probabilities: no need to sample.
SAMPLES = Step(name="samples", what="samples", run=_samples, applies=lambda case: not case.choices)
