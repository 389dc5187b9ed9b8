"""A model that thinks and calls tools, behind vLLM's parsers: what the client sees, and what is scored."""

import openai
import pytest
from live_server import (
    CHAT,
    KEY,
    NAME,
    ask,
    ask_streamed,
    by_choice,
    proxy_command,
    split_stream,
    stable,
    wait_for_scorer,
    without_score,
)
from test_same_as_vllm import TOOLS, assert_no_false_warning

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

OFF = {"uncertainty": False}
ROUTE = "chat/completions"
CALL = r'<tool_call>\n\{"name": "f", "arguments": \{"a": 1\}\}\n</tool_call>'
LONG = {"max_tokens": 64}
HIDDEN = {"include_reasoning": False}

# (what is asked more, expected status, whether a tool is called; None: as the small model likes)
CASES = [
    ({}, "scored", False),
    ({"n": 2, "temperature": 1.0, "seed": 3}, None, False),
    ({"logprobs": True}, "scored", False),
    ({"return_token_ids": True}, "scored", False),
    ({"logprobs": True, "return_token_ids": True}, "scored", False),
    (HIDDEN, "scored", False),
    (HIDDEN | {"logprobs": True, "return_token_ids": True}, "scored", False),
    (HIDDEN | TOOLS, "skipped", False),
    ({"max_tokens": 3}, "skipped", False),  # cut off while it thinks
    (HIDDEN | {"max_tokens": 3}, "skipped", False),
    (TOOLS, "scored", False),
    (TOOLS | LONG | {"structured_outputs": {"regex": CALL}}, "scored", True),
    (TOOLS | LONG | {"structured_outputs": {"regex": CALL}, "parallel_tool_calls": False}, "scored", True),
    (TOOLS | LONG | {"tool_choice": "required"}, "scored", None),
    (TOOLS | LONG | {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "scored", True),
    ({"structured_outputs": {"choice": ["red", "blue"]}}, "scored", False),
]


def check(scores, status, tool_call, messages):
    if status is not None:
        assert {score["status"] for score in scores} == {status}
    called = any(message.get("tool_calls") for message in messages)
    assert {score["tool_call"] for score in scores} == {called}
    assert tool_call in (None, called)
    assert_no_false_warning(scores)


@pytest.mark.parametrize(("more", "status", "tool_call"), CASES, ids=str)
def test_whole(thinking_server, more, status, tool_call):
    body = CHAT | more
    off = stable(ask(thinking_server, ROUTE, body | OFF))
    on, scores = without_score(ask(thinking_server, ROUTE, body), asked_logprobs="logprobs" in more)
    assert stable(on) == off
    check(scores, status, tool_call, [choice["message"] for choice in on["choices"]])


@pytest.mark.parametrize(("more", "status", "tool_call"), CASES, ids=str)
def test_streamed(thinking_server, more, status, tool_call):
    body = CHAT | more
    for _ in range(5):  # a busy server puts several tokens into one event, now and then
        off = by_choice(ask_streamed(thinking_server, ROUTE, body | OFF))
        events, scores = split_stream(ask_streamed(thinking_server, ROUTE, body))
        if by_choice(events) == off:
            break
    assert by_choice(events) == off
    deltas = [choice["delta"] for event in events if event != "[DONE]" for choice in event["choices"]]
    check(scores, status, tool_call, deltas)


def thinking_client(server):
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=KEY)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("more", [{}, HIDDEN], ids=str)
def test_answer_and_thinking_are_scored_apart(thinking_server, stream, more):
    """As if each had been given by hand."""
    body = CHAT | more | {"uncertainty": {"thinking": True}}
    if stream:
        _, (score,) = split_stream(ask_streamed(thinking_server, ROUTE, body))
    else:
        _, (score,) = without_score(ask(thinking_server, ROUTE, body))
    whole = ask(thinking_server, ROUTE, CHAT | OFF | {"return_token_ids": True})
    choice = whole["choices"][0]
    assert choice["message"]["reasoning"] == "The capital of France"
    assert choice["message"]["content"] == " Paris."
    prompt, ids = whole["prompt_token_ids"], choice["token_ids"]
    end = ids.index(314) + 1  # the model's end of thinking
    for found, before, span in ((score["thinking"], prompt, ids[:end]), (score, prompt + ids[:end], ids[end:])):
        given = ask(thinking_server, "uncertainty", {"prompt_token_ids": before, "answer_token_ids": span})
        assert found["tokens"] == given["tokens"] == len(span)
        assert found["log_grad_norm_sq"] == pytest.approx(given["log_grad_norm_sq"], abs=1e-4)
        assert found["log_probability"] == pytest.approx(given["log_probability"], abs=1e-4)
    assert (score["span"], score["thinking"]["span"]) == ("answer", "thinking")


def test_the_openai_client_puts_a_streamed_tool_call_together(thinking_server):
    with thinking_client(thinking_server) as client:
        options = {"messages": CHAT["messages"], "model": NAME, "temperature": 0, "max_tokens": 64}
        extra = {"structured_outputs": {"regex": CALL}}
        with client.chat.completions.stream(**options, tools=TOOLS["tools"], extra_body=extra) as stream:
            for _ in stream:
                pass
            message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "f"


def test_a_proxy_that_is_told_the_end_of_thinking_tells_the_spans_apart(thinking_server, start):
    """As the server's own parser does."""
    command = proxy_command(thinking_server.command[2], thinking_server)
    body = CHAT | {"uncertainty": {"thinking": True}}
    _, (mine,) = without_score(ask(thinking_server, ROUTE, body))
    with start([*command, "--thinking-end", "</think>"]) as proxy:
        proxy.wait_until_ready(["/health"])
        wait_for_scorer(proxy)
        (choice,) = ask(proxy, ROUTE, body)["choices"]
        (hidden,) = ask(proxy, ROUTE, body | HIDDEN)["choices"]
    assert hidden["message"]["reasoning"] is None
    for its in (choice["uncertainty"], hidden["uncertainty"]):
        for here, there in ((mine, its), (mine["thinking"], its["thinking"])):
            assert here["tokens"] == there["tokens"]
            assert here["span"] == there["span"]
            assert here["log_grad_norm_sq"] == pytest.approx(there["log_grad_norm_sq"], abs=1e-4)
