"""Answers from a model in this process: vLLM generates, the scorer scores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gnuq_serve.calibration.answers import OnAnswer, Sampling
from gnuq_serve.calibration.questions import Question
from gnuq_serve.calibration.working_file import Answer


class ModelSource:
    """vLLM and the scorer in this process, see `gnuq_serve.vllm.UncertaintyLLM`."""

    chunk = 64  # answered, scored and kept together; a killed run loses no more than one

    def __init__(self, model: str, *, sampling: Sampling, engine: Mapping[str, Any] | None = None) -> None:
        """Load engine and scorer.

        Args:
            model: as for ``vllm.LLM``.
            sampling: how it is to answer.
            engine: other arguments of ``vllm.LLM``.

        Raises:
            ImportError: vLLM is not installed.
        """
        self._sampling, self._engine, self.model = sampling, dict(engine or {}), model
        self._llm: Any = None  # loaded when the first question comes: a finished run needs no model

    @property
    def settings(self) -> Mapping[str, Any]:
        """Model, engine arguments and sampling."""
        return {"model": self.model, "engine": self._engine, **asdict(self._sampling)}

    def answer(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        """See `AnswerSource.answer`."""
        if questions and self._llm is None:
            # By default vLLM logs to standard output, which belongs to the result.
            os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
            from gnuq_serve.vllm import UncertaintyLLM

            self._llm = UncertaintyLLM(self.model, **self._engine)
        for start in range(0, len(questions), self.chunk):
            chunk = questions[start : start + self.chunk]
            to_ask = [question for question in chunk if question.answer is None]
            given = [question for question in chunk if question.answer is not None]
            for answer in [*self._ask(to_ask), *self._score(given)]:
                on_answer(answer)

    def close(self) -> None:
        """End the engine's processes: the fit needs their memory and cores."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown(timeout=30)
            self._llm = None

    def _ask(self, questions: Sequence[Question]) -> list[Answer]:
        from vllm import SamplingParams

        if not questions:
            return []
        chats = [list(question.messages) for question in questions]
        try:
            outputs = self._llm.chat(chats, SamplingParams(**asdict(self._sampling)), use_tqdm=False)
        except ValueError as error:  # one prompt is too long, say: vLLM refuses the whole list
            if len(questions) == 1:
                return [Answer(key=questions[0].key, failure=str(error)[:500])]
            return [answer for question in questions for answer in self._ask([question])]
        return [
            Answer(
                key=question.key,
                text=output.outputs[0].text,
                uncertainty=output.outputs[0].uncertainty,
                finish_reason=output.outputs[0].finish_reason,
                prompt_tokens=len(output.prompt_token_ids),
            )
            for question, output in zip(questions, outputs, strict=True)
        ]

    def _score(self, questions: Sequence[Question]) -> list[Answer]:
        from gnuq_serve.scorer import Sample

        if not questions:
            return []
        tokenizer = self._llm.get_tokenizer()
        samples = []
        for question in questions:
            prompt = tokenizer.apply_chat_template(
                list(question.messages), add_generation_prompt=True, return_dict=False
            )
            answer = tokenizer.encode(question.answer, add_special_tokens=False)
            samples.append(Sample(list(prompt), [*answer, tokenizer.eos_token_id]))
        scores = self._llm.scorer.score(samples, on_invalid="fail")
        return [
            Answer(
                key=question.key,
                text=question.answer or "",
                uncertainty=score,
                prompt_tokens=len(sample.prompt_ids),
            )
            for question, sample, score in zip(questions, samples, scores, strict=True)
        ]
