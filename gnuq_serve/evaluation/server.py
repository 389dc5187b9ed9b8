"""A server with uncertainty on its answers, asked by token ids: what is scored is what was read and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gnuq_serve.calibration.answers import AnswerError
from gnuq_serve.calibration.server_source import connection, gone, only_model
from gnuq_serve.evaluation.prompts import Prompt

Ids = list[int]


class RefusedError(RuntimeError):
    """The server refuses this one request: a prompt that is too long, say."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One generated answer: its text without a stop text, its token ids with it."""

    text: str
    ids: Ids
    finish_reason: str | None


class ModelServer:
    """The requests of an evaluation; use as an asynchronous context manager.

    Raises (each of its methods):
        RefusedError: the server refuses this request.
        AnswerError: the server can't be asked any more.
    """

    def __init__(self, url: str, *, api_key: str | None = None, model: str | None = None) -> None:
        """Connect.

        Args:
            url: the server's address, with or without ``/v1``.
            api_key: its key; ``OPENAI_API_KEY`` of the environment by default.
            model: its name for the model; the only one that it serves by default.

        Raises:
            AnswerError: no answer from there, or several models and none named.
            ImportError: ``openai`` is not installed.
        """
        self._connection = connection(url, api_key)
        self.url: str = self._connection["base_url"]
        self.model = model or only_model(self._connection)
        self._end_of_turn: Ids | None = None
        self._first_tokens: dict[str, int] = {}

    async def __aenter__(self) -> ModelServer:
        import openai

        self._openai = openai
        self._client = openai.AsyncOpenAI(**self._connection)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def prompt_ids(self, prompt: Prompt) -> Ids:
        """Token ids of a prompt, with what the chat template or the tokenizer adds."""
        if isinstance(prompt.content, str):
            return await self._tokenize({"prompt": prompt.content})
        return await self._tokenize({"messages": prompt.content})

    async def answer_ids(self, prompt: Prompt, text: str) -> Ids:
        """Token ids of a text as the answer to a prompt, with its end."""
        ids = await self._tokenize({"prompt": prompt.lead + text + prompt.stop, "add_special_tokens": False})
        return [*ids, *(() if prompt.stop else await self._end())]

    async def word_id(self, prompt: Prompt, word: str) -> int:
        """The first token of a word as the answer to a prompt."""
        text = prompt.lead + word
        if text not in self._first_tokens:
            ids = await self._tokenize({"prompt": text, "add_special_tokens": False})
            self._first_tokens[text] = ids[0]
        return self._first_tokens[text]

    async def generate(
        self, ids: Ids, *, max_tokens: int, stop: str = "", temperature: float = 0.0, n: int = 1, seed: int = 0
    ) -> list[Completion]:
        """``n`` answers to a prompt."""
        request: dict[str, Any] = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "n": n,
            "return_token_ids": True,
        }
        if stop:
            request["stop"] = stop
        if temperature > 0:
            request["seed"] = seed
        found = await self._complete(ids, request)
        return [Completion(choice["text"], choice["token_ids"], choice["finish_reason"]) for choice in found]

    async def log_probabilities(self, prompt: Ids, answer: Ids) -> list[float]:
        """``log p_t`` of each token of a given answer; one forward pass."""
        (choice,) = await self._complete([*prompt, *answer], {"max_tokens": 1, "prompt_logprobs": 0})
        entries = choice["prompt_logprobs"][len(prompt) :]
        return [entry[str(token)]["logprob"] for entry, token in zip(entries, answer, strict=True)]

    async def next_token(self, prompt: Ids, candidates: Sequence[int]) -> list[float]:
        """``log p`` of some tokens as the next one."""
        request = {
            "max_tokens": 1,
            "logprobs": len(candidates),
            "logprob_token_ids": list(candidates),
            "return_tokens_as_token_ids": True,
        }
        (choice,) = await self._complete(prompt, request)
        (found,) = choice["logprobs"]["top_logprobs"]
        return [found[f"token_id:{token}"] for token in candidates]

    async def score(self, prompt: Ids, answer: Ids, **options: bool) -> dict[str, Any]:
        """The uncertainty of an answer, in its JSON form."""
        body = {
            "model": self.model,
            "prompt_token_ids": prompt,
            "answer_token_ids": answer,
            "uncertainty": {"wait": True, **options},
        }
        return await self._post("/uncertainty", body)

    async def _end(self) -> Ids:
        """What ends a turn of the assistant: the first token that the chat template puts behind its words."""
        if self._end_of_turn is None:
            word = await self._tokenize({"prompt": "y", "add_special_tokens": False})
            asked = [{"role": "user", "content": "x"}]
            before = await self._tokenize({"messages": asked})
            told = [*asked, {"role": "assistant", "content": "y"}]
            whole = await self._tokenize({"messages": told, "add_generation_prompt": False})
            rest = whole[len(before) :]
            known = whole[: len(before)] == before and rest[: len(word)] == word
            self._end_of_turn = rest[len(word) : len(word) + 1] if known else []
        return self._end_of_turn

    async def _complete(self, ids: Ids, request: dict[str, Any]) -> list[dict[str, Any]]:
        body = {"model": self.model, "prompt": ids, "temperature": 0.0, "uncertainty": False, **request}
        choices: list[dict[str, Any]] = (await self._post("/completions", body))["choices"]
        return choices

    async def _tokenize(self, body: dict[str, Any]) -> Ids:
        root = self.url.removesuffix("/v1")
        tokens: Ids = (await self._post(f"{root}/tokenize", {"model": self.model, **body}))["tokens"]
        return tokens

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            found: Any = await self._client.post(path, body=body, cast_to=object)
        except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
            raise RefusedError(str(error)[:500]) from error
        except self._openai.NotFoundError as error:
            raise AnswerError(
                f"{self.url} has no route {path}: it must be a vLLM server started with `gnuq-serve serve`"
            ) from error
        except self._openai.OpenAIError as error:
            raise gone(self.url, error) from error
        return dict(found)
