"""Where the thinking ends, by the text that ends it: for a server whose reasoning parser we can't call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gnuq_serve.service.answer import ThinkingLength


def thinking_until(marker_ids: Sequence[int]) -> ThinkingLength:
    """A function that counts an answer's thinking tokens.

    Args:
        marker_ids: tokens of the marker, such as those of ``</think>``; its first occurrence counts, as for
            vLLM's parsers.
    """
    marker = list(marker_ids)

    def thinking_length(answer_ids: Sequence[int], _template_options: Mapping[str, object]) -> int | None:
        for end in range(len(marker), len(answer_ids)):  # something follows
            if list(answer_ids[end - len(marker) : end]) == marker:
                return end
        return None

    return thinking_length
