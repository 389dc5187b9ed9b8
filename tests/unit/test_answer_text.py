"""Question and answer as text, for the operator's log; and a request that the operator wants no score of."""

import pytest
from test_response_edit import CHAT, TEXT, chat_response, text_response
from test_stream_edit import PLAIN, THINKING, TOOL, edited, vllm_events

from gnuq_serve.service.requests.given_answer import GivenAnswer
from gnuq_serve.service.requests.request_plan import plan_request
from gnuq_serve.service.responses.response_edit import read_answers
from gnuq_serve.service.seeing.reasons import reason_code

MESSAGES = CHAT["messages"]


def texts(answers):
    return [(one.text.question, one.text.answer) if one.text is not None else None for one in answers]


def test_there_is_none_unless_it_is_wanted():
    plan = plan_request("chat", CHAT)
    assert texts(read_answers(plan, chat_response())) == [None]


def test_of_a_chat():
    plan = plan_request("chat", CHAT, keep_text=True)
    calls_a_tool = {"message": {"content": None, "tool_calls": [{"function": {}}]}}
    answers = read_answers(plan, chat_response({}, calls_a_tool))
    assert texts(answers) == [(MESSAGES, "Hello"), (MESSAGES, "")]


def test_of_completions_each_choice_has_its_own_prompt():
    plan = plan_request("completion", TEXT | {"prompt": ["How are", "Who are"], "n": 2}, keep_text=True)
    response = text_response(*({"text": f" you {number}"} for number in range(4)))
    assert texts(read_answers(plan, response)) == [
        ("How are", " you 0"),
        ("How are", " you 1"),
        ("Who are", " you 2"),
        ("Who are", " you 3"),
    ]


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2], [3]]])
def test_of_token_ids_there_is_none(prompt):
    plan = plan_request("completion", TEXT | {"prompt": prompt}, keep_text=True)
    assert texts(read_answers(plan, text_response())) == [None]


def test_of_a_stream_without_the_thinking():
    plan = plan_request("chat", CHAT | {"stream": True, "n": 3}, keep_text=True)
    editor, _ = edited(plan, vllm_events(plan.body, [PLAIN, THINKING, TOOL]))
    assert texts(editor.answers(lambda *_: 5)) == [(MESSAGES, "Paris"), (MESSAGES, " Paris."), (MESSAGES, "")]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"messages": MESSAGES, "answer": "Hello"}, (MESSAGES, "Hello")),
        ({"prompt": "How are", "answer": " you"}, ("How are", " you")),
        ({"prompt_token_ids": [1], "answer_token_ids": [2]}, None),
    ],
)
def test_of_a_given_answer(body, expected):
    text = GivenAnswer.read(body).text
    assert (None if text is None else (text.question, text.answer)) == expected


@pytest.mark.parametrize("reason", ["scoring is switched off by the operator", "not drawn: score_fraction=0.1"])
@pytest.mark.parametrize(("route", "request_body"), [("chat", CHAT), ("completion", TEXT)])
def test_a_request_that_is_not_scored_now_reaches_vllm_as_it_was(route, request_body, reason):
    plan = plan_request(route, request_body | {"uncertainty": {"trace": True}}, not_now=reason)
    assert plan.body == request_body
    assert (plan.skip, plan.unscored) == (reason, None)
    assert reason_code(reason) in ("switched_off", "not_drawn")
    # What the client does not want it still does not get.
    assert plan_request(route, request_body | {"uncertainty": False}, not_now=reason).unscored == "off"
