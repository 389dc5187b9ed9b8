"""``POST /v1/uncertainty``: an answer that the client gives, as token ids."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gnuq_serve.service.answer import Answer, AnswerText
from gnuq_serve.service.requests.request_plan import InvalidRequestError, RequestOptions, read_options

# A body of vLLM's /tokenize -> token ids; raises TokenizeError.
Tokenize = Callable[[dict[str, Any]], Awaitable[list[int]]]

_FORMS = "give `messages` and `answer`, `prompt` and `answer`, or `prompt_token_ids` and `answer_token_ids`"
_TEMPLATE_FIELDS = ("tools", "chat_template", "chat_template_kwargs")
_COMMON_FIELDS = ("model", "uncertainty", "end_of_turn")


class TokenizeError(InvalidRequestError):
    """The server could not make token ids of a text; the message is the server's."""


@dataclass(frozen=True, slots=True)
class GivenAnswer:
    """A question and an answer to score, as the client gave them.

    Attributes:
        body: the request, checked.
        options: what is asked of the score.
        model: the model or adapter named, if any.
    """

    body: Mapping[str, Any]
    options: RequestOptions
    model: str | None

    @classmethod
    def read(cls, body: Any) -> GivenAnswer:
        """Check a request.

        Raises:
            InvalidRequestError: a field is missing, unknown or of the wrong kind; the message names it.
        """
        if not isinstance(body, Mapping):
            raise InvalidRequestError(f"the body must be an object: {_FORMS}")
        if "messages" in body:
            expected: dict[str, type] = {"messages": list, "answer": str}
        elif "prompt" in body:
            expected = {"prompt": str, "answer": str}
        else:
            expected = {"prompt_token_ids": list, "answer_token_ids": list}
        allowed = {*expected, *_COMMON_FIELDS, *(_TEMPLATE_FIELDS if "messages" in body else ())}
        for name in body:
            if name not in allowed:
                raise InvalidRequestError(f"{name} is unknown here; {_FORMS}")
        for name, kind in expected.items():
            if not isinstance(body.get(name), kind) or not body[name]:
                wanted = "a text" if kind is str else "a list"
                raise InvalidRequestError(f"{name} must be {wanted} that is not empty; {_FORMS}")
            if name.endswith("_ids") and not all(type(one) is int for one in body[name]):
                raise InvalidRequestError(f"{name} must be a list of whole numbers")
        if type(body.get("end_of_turn", True)) is not bool:
            raise InvalidRequestError("end_of_turn must be true or false")
        model = body.get("model")
        if not isinstance(model, str | None):
            raise InvalidRequestError("model must be a text")
        options = read_options(body.get("uncertainty"))
        if options is None:
            raise InvalidRequestError("uncertainty: false leaves nothing to do here")
        return cls(body, options, model)

    @property
    def text(self) -> AnswerText | None:
        """Question and answer in words; None where the client gave token ids."""
        body = self.body
        if "answer" not in body:
            return None
        return AnswerText(body.get("prompt") or body["messages"], body["answer"])

    async def answer(self, tokenize: Tokenize, end_of_turn_ids: Sequence[int]) -> Answer:
        """The token ids to score.

        Args:
            tokenize: vLLM's own, so that prompts are read as in a chat.
            end_of_turn_ids: tokens that may end an answer, the tokenizer's own first.

        Raises:
            TokenizeError: vLLM refused the text.
        """
        body = self.body
        if "prompt_token_ids" in body:
            return Answer(list(body["prompt_token_ids"]), list(body["answer_token_ids"]))
        answer_ids = await tokenize({"prompt": body["answer"], "add_special_tokens": False})
        if not answer_ids:
            raise TokenizeError("answer has no tokens")
        if "prompt" in body:
            prompt_ids = await tokenize({"prompt": body["prompt"]})
            end = end_of_turn_ids[:1]
        else:
            prompt_ids, end = await self._chat(tokenize, end_of_turn_ids)
        if body.get("end_of_turn", True):
            answer_ids = [*answer_ids, *end]
        return Answer(prompt_ids, answer_ids)

    async def _chat(self, tokenize: Tokenize, end_of_turn_ids: Sequence[int]) -> tuple[list[int], Sequence[int]]:
        body = self.body
        template = {name: body[name] for name in _TEMPLATE_FIELDS if name in body}
        prompt_ids = await tokenize({"messages": body["messages"], **template})
        if not body.get("end_of_turn", True):
            return prompt_ids, ()
        # Of several tokens that may end an answer, the one that the template puts behind it.
        told = [*body["messages"], {"role": "assistant", "content": body["answer"]}]
        whole = await tokenize({"messages": told, "add_generation_prompt": False, **template})
        ends = [token for token in whole[len(prompt_ids) :] if token in end_of_turn_ids]
        return prompt_ids, ends[-1:] or end_of_turn_ids[:1]
