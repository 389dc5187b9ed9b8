import asyncio

import pytest

from gnuq_serve.service.requests.given_answer import GivenAnswer
from gnuq_serve.service.requests.request_plan import InvalidRequestError, RequestOptions

MESSAGES = [{"role": "user", "content": "hi"}]
END, OTHER_END = 2, 3
TURN = 90  # begins each turn of the chat template below; the generation prompt is 91


async def tokenize(body):
    """One id for each character; a chat template that ends turns with OTHER_END and a newline."""
    if "prompt" in body:
        return ([1] if body.get("add_special_tokens", True) else []) + [*map(ord, body["prompt"])]
    ids = []
    for message in body["messages"]:
        ids += [TURN, *map(ord, message["content"]), OTHER_END, ord("\n")]
    return ids + ([91] if body.get("add_generation_prompt", True) else [])


def answer(body, ends=(END, OTHER_END)):
    return asyncio.run(GivenAnswer.read(body).answer(tokenize, ends))


def test_token_ids_are_taken_as_they_are():
    given = answer({"prompt_token_ids": [5, 6], "answer_token_ids": [7]})
    assert (given.prompt_ids, given.answer_ids) == ([5, 6], [7])


def test_a_text_gets_the_tokenizers_end_token():
    given = answer({"prompt": "ab", "answer": "c"})
    assert (given.prompt_ids, given.answer_ids) == ([1, 97, 98], [99, END])
    assert answer({"prompt": "ab", "answer": "c", "end_of_turn": False}).answer_ids == [99]


def test_a_chat_gets_the_token_that_its_template_puts_behind_an_answer():
    given = answer({"messages": MESSAGES, "answer": "c"})
    assert given.prompt_ids == [TURN, 104, 105, OTHER_END, 10, 91]
    assert given.answer_ids == [99, OTHER_END]
    assert answer({"messages": MESSAGES, "answer": "c"}, ends=(END,)).answer_ids == [99, END]
    assert answer({"messages": MESSAGES, "answer": "c"}, ends=()).answer_ids == [99]
    assert answer({"messages": MESSAGES, "answer": "c", "end_of_turn": False}).answer_ids == [99]


def test_options():
    body = {"prompt": "a", "answer": "b"}
    assert GivenAnswer.read(body).options == RequestOptions()
    assert GivenAnswer.read(body | {"uncertainty": {"wait": False}}).options == RequestOptions(wait=False)
    assert GivenAnswer.read(body | {"model": "m"}).model == "m"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "the body must be an object"),
        ({}, "prompt_token_ids must be a list"),
        ({"prompt": "a"}, "answer must be a text"),
        ({"prompt": "a", "answer": ""}, "answer must be a text that is not empty"),
        ({"prompt": ["a"], "answer": "b"}, "prompt must be a text"),
        ({"messages": "a", "answer": "b"}, "messages must be a list"),
        ({"messages": [], "answer": "b"}, "messages must be a list that is not empty"),
        ({"messages": MESSAGES, "prompt": "a", "answer": "b"}, "prompt is unknown here"),
        ({"prompt": "a", "answer": "b", "tools": []}, "tools is unknown here"),
        (
            {"prompt_token_ids": [1], "answer_token_ids": ["a"]},
            "answer_token_ids must be a list of whole numbers",
        ),
        (
            {"prompt_token_ids": [True], "answer_token_ids": [1]},
            "prompt_token_ids must be a list of whole numbers",
        ),
        ({"prompt": "a", "answer": "b", "end_of_turn": "no"}, "end_of_turn must be true or false"),
        ({"prompt": "a", "answer": "b", "model": 7}, "model must be a text"),
        ({"prompt": "a", "answer": "b", "uncertainty": False}, "nothing to do"),
        ({"prompt": "a", "answer": "b", "uncertainty": {"odd": 1}}, "uncertainty.odd is unknown"),
        ({"prompt": "a", "anser": "b"}, "anser is unknown here"),
    ],
)
def test_mistakes_name_the_field(body, message):
    with pytest.raises(InvalidRequestError, match=message):
        GivenAnswer.read(body)
