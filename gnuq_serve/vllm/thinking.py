"""Where the thinking ends, by vLLM's own reasoning parser."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)


class ThinkingFinder:
    """Counts an answer's thinking tokens with the server's reasoning parser."""

    def __init__(self, parser: Any, tokenizer: Any, template_defaults: dict[str, Any], model_config: Any) -> None:
        """Keep what a parser is made of.

        Args:
            parser: vLLM's class of the server's reasoning parser.
            tokenizer: the server's.
            template_defaults: what the server hands to the chat template where a request does not.
            model_config: vLLM's.
        """
        self._parser, self._tokenizer = parser, tokenizer
        self._template_defaults, self._model_config = template_defaults, model_config

    def __call__(self, answer_ids: Sequence[int], template_options: Mapping[str, object]) -> int | None:
        """How many of the answer's ids are thinking, its end marker included; None where that can't be told."""
        options = {**self._template_defaults, **template_options}
        try:
            parser = self._parser(self._tokenizer, chat_template_kwargs=options, model_config=self._model_config)
            return _by_content(parser, list(answer_ids)) or _by_end(parser, list(answer_ids))
        except Exception as error:  # parsers are many, and plugins among them
            logger.warning("%s can't tell where the thinking ends: %r", self._parser.__name__, error)
            return None


def _by_content(parser: Any, answer_ids: list[int]) -> int | None:
    """By the ids that the parser calls content, where they are the end of the answer but not all of it."""
    try:
        content_ids = list(parser.extract_content_ids(answer_ids))
    except NotImplementedError:
        return None
    if not content_ids or content_ids != answer_ids[-len(content_ids) :]:
        return None
    return len(answer_ids) - len(content_ids)


def _by_end(parser: Any, answer_ids: list[int]) -> int | None:
    """By the shortest beginning of the answer in which, for the parser, the thinking has ended."""
    if not parser.is_reasoning_end(answer_ids):
        return None
    length = bisect_left(range(len(answer_ids)), True, key=lambda n: parser.is_reasoning_end(answer_ids[:n]))
    return length if 0 < length < len(answer_ids) else None
