import copy
import json
import math

import pytest

from gnuq_serve.service.requests.request_plan import plan_request
from gnuq_serve.service.responses.response_edit import attach, read_answers
from gnuq_serve.uncertainty import Uncertainty

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "m", "prompt": "Hi"}


def scored(number=1):
    return Uncertainty(status="scored", id=f"unc-{number}", log_probability=-1.0 * number, tokens=2).to_dict()


def read(plan, response):
    """What is scored of each answer, and the engine's l of it."""
    spans = [None if answer is None else answer.answer_span for answer in read_answers(plan, response)]
    return [None if span is None else (span.prompt_ids, span.answer_ids, span.log_probability) for span in spans]


def chat_logprobs(*values):
    content = [{"token": "t", "logprob": value, "bytes": [116], "top_logprobs": []} for value in values]
    return {"content": content, "refusal": None}


def chat_response(*choices):
    """What vLLM sends when token ids and logprobs were asked for."""
    return {
        "id": "chatcmpl-1",
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": "Hello", "tool_calls": []},
                "logprobs": chat_logprobs(-0.5, -0.25),
                "finish_reason": "stop",
                "token_ids": [7, 2],
            }
            | choice
            for index, choice in enumerate(choices or [{}])
        ],
        "prompt_token_ids": [1, 5, 6],
    }


def text_response(*choices):
    return {
        "id": "cmpl-1",
        "choices": [
            {
                "index": index,
                "text": " you",
                "logprobs": {
                    "tokens": ["a", "b"],
                    "token_logprobs": [-0.5, -0.25],
                    "top_logprobs": [None, None],
                    "text_offset": [0, 1],
                },
                "token_ids": [7, 2],
                "prompt_token_ids": [1, 5],
            }
            | choice
            for index, choice in enumerate(choices or [{}])
        ],
    }


def test_answers_of_a_chat():
    plan = plan_request("chat", CHAT)
    assert read(plan, chat_response()) == [([1, 5, 6], [7, 2], -0.75)]


def test_n_choices_share_the_prompt():
    plan = plan_request("chat", CHAT | {"n": 2})
    answers = read(plan, chat_response({}, {"token_ids": [9], "logprobs": chat_logprobs(-3.0)}))
    assert answers == [([1, 5, 6], [7, 2], -0.75), ([1, 5, 6], [9], -3.0)]


def test_answers_of_a_list_of_prompts_have_each_its_own():
    plan = plan_request("completion", TEXT | {"prompt": ["a", "b"], "n": 2})
    response = text_response({}, {}, {"prompt_token_ids": [8]}, {"prompt_token_ids": [8]})
    assert [prompt_ids for prompt_ids, _, _ in read(plan, response)] == [[1, 5], [1, 5], [8], [8]]
    assert {number for _, _, number in read(plan, response)} == {-0.75}


@pytest.mark.parametrize(
    "choice",
    [
        {"logprobs": None},
        {"logprobs": {}},
        {"logprobs": {"content": None}},
        {"logprobs": chat_logprobs(-0.5)},  # of another number of tokens: not the same thing
        {"logprobs": {"content": []}},
    ],
)
def test_without_fitting_logprobs_there_is_nothing_to_compare(choice):
    assert read(plan_request("chat", CHAT), chat_response(choice)) == [([1, 5, 6], [7, 2], None)]


def test_logprobs_under_a_grammar_are_not_read():
    plan = plan_request("chat", CHAT | {"tool_choice": "required"})
    assert read(plan, chat_response())[0][2] is None


def test_missing_token_ids():
    plan = plan_request("chat", CHAT | {"n": 2})
    response = chat_response({"token_ids": None}, {})
    assert read(plan, response) == [None, ([1, 5, 6], [7, 2], -0.75)]
    response = chat_response()
    del response["prompt_token_ids"]
    assert read(plan, response) == [None]
    del response["choices"][0]["token_ids"]
    assert read(plan, response) == [None]


def test_an_answer_of_no_tokens_is_still_an_answer():
    response = chat_response({"token_ids": [], "logprobs": {"content": []}})
    assert read(plan_request("chat", CHAT), response) == [([1, 5, 6], [], None)]


def test_the_sum_is_exact():
    values = [-0.1] * 1000
    response = chat_response({"token_ids": [1] * 1000, "logprobs": chat_logprobs(*values)})
    assert read(plan_request("chat", CHAT), response)[0][2] == math.fsum(values)


@pytest.mark.parametrize(
    ("route", "request_body", "response"),
    [("chat", CHAT, chat_response()), ("completion", TEXT, text_response())],
)
def test_what_only_we_asked_for_is_null_again(route, request_body, response):
    before = copy.deepcopy(response)
    attach(plan_request(route, request_body), response, [scored()], mirror=False)
    expected = copy.deepcopy(before)
    if route == "chat":
        expected["prompt_token_ids"] = None
    else:
        expected["choices"][0]["prompt_token_ids"] = None
    expected["choices"][0] |= {"token_ids": None, "logprobs": None, "uncertainty": scored()}
    assert response == expected
    json.dumps(response, allow_nan=False)


@pytest.mark.parametrize(
    ("route", "request_body", "response"),
    [("chat", CHAT, chat_response()), ("completion", TEXT, text_response())],
)
@pytest.mark.parametrize("extra", [{}, {"model": "lora"}], ids=["scored", "skipped"])
def test_what_the_client_asked_for_stays(route, request_body, response, extra):
    response = copy.deepcopy(response)
    expected = copy.deepcopy(response)
    plan = plan_request(route, request_body | {"logprobs": 1, "return_token_ids": True} | extra, ["lora"])
    attach(plan, response, [scored()], mirror=False)
    expected["choices"][0]["uncertainty"] = scored()
    assert response == expected


def test_keys_that_vllm_does_not_send_are_not_invented():
    response = {"choices": [{"index": 0, "message": {}, "logprobs": None}]}
    attach(plan_request("chat", CHAT), response, [scored()], mirror=False)
    assert set(response) == {"choices"}
    assert set(response["choices"][0]) == {"index", "message", "logprobs", "uncertainty"}


@pytest.mark.parametrize("extra", [{}, {"logprobs": True}, {"model": "lora"}])
@pytest.mark.parametrize("mirror", [True, False])
def test_a_choice_without_logprobs_key(extra, mirror):
    response = {"choices": [{"index": 0, "message": {}}]}
    attach(plan_request("chat", CHAT | extra, ["lora"]), response, [scored()], mirror=mirror)
    assert response["choices"][0]["uncertainty"] == scored()


@pytest.mark.parametrize(
    ("route", "request_body", "response", "empty"),
    [
        ("chat", CHAT, chat_response(), {"content": None}),
        ("completion", TEXT, text_response(), {"tokens": None, "token_logprobs": None}),
    ],
)
def test_mirror(route, request_body, response, empty):
    unasked, asked = copy.deepcopy(response), copy.deepcopy(response)
    attach(plan_request(route, request_body), unasked, [scored()], mirror=True)
    assert unasked["choices"][0]["logprobs"] == {**empty, "uncertainty": scored()}
    attach(plan_request(route, request_body | {"logprobs": 1}), asked, [scored()], mirror=True)
    mirrored = response["choices"][0]["logprobs"] | {"uncertainty": scored()}
    assert asked["choices"][0]["logprobs"] == mirrored


def test_each_choice_gets_its_own():
    response = chat_response({}, {}, {})
    attach(plan_request("chat", CHAT | {"n": 3}), response, [scored(i) for i in range(3)], mirror=True)
    for i, choice in enumerate(response["choices"]):
        assert choice["uncertainty"]["id"] == choice["logprobs"]["uncertainty"]["id"] == f"unc-{i}"


@pytest.mark.parametrize(
    ("tool_calls", "flag"), [([{"id": "1", "function": {"name": "f"}}], True), ([], False), (None, False)]
)
def test_tool_call_flag(tool_calls, flag):
    message = {"role": "assistant", "content": None, "tool_calls": tool_calls}
    response = chat_response({"message": message})
    attach(plan_request("chat", CHAT), response, [scored()], mirror=False)
    assert response["choices"][0]["uncertainty"]["tool_call"] is flag


def test_too_few_uncertainties_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        attach(plan_request("chat", CHAT), chat_response({}, {}), [scored()], mirror=False)
