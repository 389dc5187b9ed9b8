"""Samples to measure with: questions with the model's own greedy answers, and real text cut to exact lengths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from built_in_prompts import QUESTIONS, REQUESTS

from gnuq_serve import Sample, Scorer

GENERATION_BATCH = 16


@dataclass(frozen=True, slots=True)
class Prompts:
    """A named list of user messages."""

    name: str
    texts: list[str]


def read_prompts(paths: Sequence[Path]) -> list[Prompts]:
    """One list for each JSON Lines file (rows with ``question``, or ``turns``: the first); none given: our own.

    Raises:
        ValueError: a row has neither field.
    """
    if not paths:
        return [Prompts("questions", list(QUESTIONS)), Prompts("requests", list(REQUESTS))]
    return [Prompts(path.stem, _texts(path)) for path in paths]


def _texts(path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if "question" not in row and not row.get("turns"):
            raise ValueError(f"{path}, line {number}: neither `question` nor `turns`; give rows with one of them")
        texts.append(row["question"] if "question" in row else row["turns"][0])
    return texts


class Source:
    """Makes samples of one model; its greedy answers are kept in a JSON file, so that a second run has them."""

    def __init__(self, scorer: Scorer, tokenizer: Any, prompts: Sequence[Prompts], folder: Path) -> None:
        self.model: Any = scorer.model
        self.tokenizer = tokenizer
        self._model_name = scorer.fingerprint
        self._file = folder / "greedy_answers.json"
        self._answers: dict[str, list[int]] = json.loads(self._file.read_text()) if self._file.exists() else {}
        text = "\n".join(text for group in prompts for text in group.texts[:200])
        self._stream: list[int] = tokenizer.encode(text, add_special_tokens=False)

    def chat(self, text: str) -> list[int]:
        """Ids of a chat with this one user message, up to where the answer begins."""
        chat = [{"role": "user", "content": text}]
        ids: list[int] = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        return ids

    def answered(self, texts: Sequence[str], count: int, *, answer_tokens: int, longest: int) -> list[Sample]:
        """The first ``count`` texts of which prompt and greedy answer have at most ``longest`` tokens together.

        Raises:
            ValueError: there are not that many.
        """
        samples: list[Sample] = []
        fitting = [ids for ids in map(self.chat, texts) if len(ids) < longest]
        for start in range(0, len(fitting), GENERATION_BATCH):
            prompts = fitting[start : start + GENERATION_BATCH]
            for ids, answer in zip(prompts, self.greedy(prompts, answer_tokens), strict=True):
                if len(ids) + len(answer) <= longest:
                    samples.append(Sample(ids, answer))
            if len(samples) >= count:
                return samples[:count]
        raise ValueError(f"only {len(samples)} of {len(texts)} texts fit in {longest} tokens; {count} are needed")

    def greedy(
        self, prompts: Sequence[list[int]], answer_tokens: int, *, exactly: bool = False
    ) -> list[list[int]]:
        """Greedy answers with their end-of-turn token; ``exactly``: of that many tokens, come what may."""
        keys = [self._key(ids, answer_tokens, exactly) for ids in prompts]
        absent = [i for i, key in enumerate(keys) if key not in self._answers]
        for start in range(0, len(absent), GENERATION_BATCH):
            chunk = absent[start : start + GENERATION_BATCH]
            for i, answer in zip(
                chunk, self._generate([prompts[i] for i in chunk], answer_tokens, exactly), strict=True
            ):
                self._answers[keys[i]] = answer
        if absent:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(self._answers))
        return [self._answers[key] for key in keys]

    def exact_length(self, length: int, count: int, *, answer_tokens: int | None = None) -> list[Sample]:
        """``count`` samples of exactly ``length`` tokens, each from another place of the prompts' text.

        The text is repeated where it is too short. Default: 48 answer tokens, half of the sample if that is less.
        """
        answer_tokens = answer_tokens or min(48, length // 2)
        ids = [self._cut(i, length) for i in range(count)]
        return [Sample(row[:-answer_tokens], row[-answer_tokens:]) for row in ids]

    def exact_length_greedy(self, prompt_tokens: int, answer_tokens: int) -> Sample:
        """A prompt of real text of exactly that length, and exactly that many tokens of greedy answer."""
        prompt = self._cut(0, prompt_tokens)
        return Sample(prompt, self.greedy([prompt], answer_tokens, exactly=True)[0])

    def _cut(self, number: int, length: int) -> list[int]:
        start = number * 97 % len(self._stream)
        return list(islice(cycle(self._stream), start, start + length))

    def _key(self, ids: list[int], answer_tokens: int, exactly: bool) -> str:
        return hashlib.sha256(json.dumps([self._model_name, ids, answer_tokens, exactly]).encode()).hexdigest()

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], answer_tokens: int, exactly: bool) -> list[list[int]]:
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        settings = {"max_new_tokens": answer_tokens, "min_new_tokens": answer_tokens if exactly else 1}
        written = self.model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=pad, **settings)
        answers = written[:, width:].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in answers]
