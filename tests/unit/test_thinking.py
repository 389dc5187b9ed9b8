import pytest

from gnuq_serve.vllm.thinking import ThinkingFinder

END = 9


class ByContent:
    """A parser that knows which ids are content."""

    def __init__(self, tokenizer, *, chat_template_kwargs, model_config):
        self.thinks = chat_template_kwargs.get("enable_thinking", True)

    def extract_content_ids(self, ids):
        return ids[ids.index(END) + 1 :] if self.thinks and END in ids[:-1] else [] if self.thinks else ids

    def is_reasoning_end(self, ids):
        return END in ids


class ByEnd(ByContent):
    """A parser that only knows whether the thinking is over."""

    def extract_content_ids(self, ids):
        raise NotImplementedError


class Retokenised(ByContent):
    """A parser whose content is the text, tokenised again."""

    def extract_content_ids(self, ids):
        return [100, 101]


class Broken(ByContent):
    def extract_content_ids(self, ids):
        raise KeyError("no such token")


def length(parser, ids, **options):
    return ThinkingFinder(parser, None, {"from": "server"}, None)(ids, options)


@pytest.mark.parametrize("parser", [ByContent, ByEnd, Retokenised])
@pytest.mark.parametrize(
    ("ids", "thinking"),
    [([1, 2, END, 3, 4], 3), ([END, 3], 1), ([1, END, 2, END, 3], 2), ([1, 2, 3], None), ([1, 2, END], None)],
)
def test_the_end_of_the_thinking(parser, ids, thinking):
    assert length(parser, ids) == thinking


def test_the_requests_template_options_reach_the_parser():
    assert length(ByContent, [1, 2, 3], enable_thinking=False) is None


def test_a_parser_that_fails_costs_nothing(caplog):
    assert length(Broken, [1, END, 2]) is None
    assert "Broken can't tell where the thinking ends" in caplog.text
