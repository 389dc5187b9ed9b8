"""Whatever is asked: switched off, a response is vLLM's; scored, it is vLLM's but for the score.

Asked of a plain vLLM server, of ours with scoring off, and of ours; streamed and not.
"""

import pytest
from live_server import BODIES, ask, ask_streamed, by_choice, split_stream, stable, without_score

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

CHAT, TEXT = "chat/completions", "completions"
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"enum": [1]}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS = {"tools": [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]}
TWICE = {"n": 2, "temperature": 1.0, "seed": 7}
PARIS = [504, 3575, 282, 4649, 314]

# (route, what is asked more, expected status of the scores; None: vLLM refuses)
CASES = [
    (CHAT, {}, "scored"),
    (CHAT, TWICE, "scored"),
    (CHAT, {"logprobs": True, "top_logprobs": 2}, "scored"),
    (CHAT, {"return_token_ids": True}, "scored"),
    (CHAT, {"return_token_ids": True, "logprobs": True} | TWICE, "scored"),
    (CHAT, {"stop": ["of France is"]}, "scored"),
    (CHAT, {"stop": ["Paris"], "include_stop_str_in_output": True}, "scored"),
    (CHAT, {"max_tokens": 3}, "scored"),
    (CHAT, {"max_tokens": 1}, "scored"),
    (CHAT, {"include_reasoning": False}, "scored"),
    (CHAT, {"include_reasoning": False, "logprobs": True, "return_token_ids": True}, "scored"),
    (CHAT, {"response_format": {"type": "json_object"}}, "scored"),
    (CHAT, {"structured_outputs": {"choice": ["Paris", "London"]}}, "scored"),
    (CHAT, TOOLS | {"tool_choice": "none"}, "scored"),
    (CHAT, TOOLS, "scored"),
    (CHAT, TOOLS | {"tool_choice": "required"}, "scored"),
    (CHAT, {"return_prompt_text": True}, "scored"),
    (CHAT, {"top_logprobs": 2}, None),
    (CHAT, {"temperature": -1}, None),
    (
        CHAT,
        {
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The capital"}],
            "echo": True,
            "add_generation_prompt": False,
            "continue_final_message": True,
        },
        "scored",
    ),
    (TEXT, {}, "scored"),
    (TEXT, TWICE, "scored"),
    (TEXT, {"logprobs": 0}, "scored"),
    (TEXT, {"logprobs": 2, "return_token_ids": True}, "scored"),
    (TEXT, {"stop": ["."]}, "scored"),
    (TEXT, {"prompt": ["The capital of France is", "Two and two make"]}, "scored"),
    (TEXT, {"prompt": ["The capital of France is", "Two and two make"], **TWICE}, "scored"),
    (TEXT, {"prompt": PARIS}, "scored"),
    (TEXT, {"prompt": [PARIS, PARIS[:3]]}, "scored"),
    (TEXT, {"echo": True}, "scored"),
    (TEXT, {"echo": True, "logprobs": 1}, "scored"),
    (TEXT, {"echo": True, "return_token_ids": True}, "scored"),
    (TEXT, {"echo": True, "prompt": ["The capital of France is", "Two and two make"], **TWICE}, "scored"),
    (TEXT, {"echo": True, "max_tokens": 0}, "skipped"),
    (TEXT, {"echo": True, "prompt": PARIS}, "skipped"),
    (TEXT, {"echo": True, "prompt": PARIS, "return_token_ids": True, "logprobs": 0}, "scored"),
]
STREAMED = [
    *CASES,
    (CHAT, {"stream_options": {"include_usage": True}}, "scored"),
    (CHAT, {"stream_options": {"include_usage": True, "continuous_usage_stats": True}} | TWICE, "scored"),
    (TEXT, {"stream_options": {"include_usage": True}}, "scored"),
    (TEXT, {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "echo": True}, "scored"),
]
WHOLE = [
    *CASES,
    (CHAT, {"prompt_logprobs": 1}, "scored"),
    (TEXT, {"prompt_logprobs": 0}, "scored"),
    (CHAT, {"use_beam_search": True, "n": 2, "max_tokens": 4}, "scored"),
]
OFF = {"uncertainty": False}
TRIES = 10


@pytest.mark.parametrize(("route", "more", "status"), WHOLE, ids=str)
def test_whole(server, plain_server, route, more, status):
    body = BODIES[route] | more
    for _ in range(TRIES):  # a busy server batches choices otherwise, now and then, and logprobs round otherwise
        plain = stable(ask(plain_server, route, body))
        off, on = ask(server, route, body | OFF), ask(server, route, body)
        scores = []
        if status is not None:
            on, scores = without_score(on, asked_logprobs="logprobs" in more)
        if stable(off) == stable(on) == plain:
            break
    assert stable(off) == plain
    assert stable(on) == plain
    if status is None:
        assert "error" in plain
        return
    assert {score["status"] for score in scores} == {status}
    assert_no_false_warning(scores)


@pytest.mark.parametrize(("route", "more", "status"), STREAMED, ids=str)
def test_streamed(server, plain_server, route, more, status):
    body = BODIES[route] | more
    for _ in range(TRIES):  # a busy server puts several tokens into one event, now and then
        plain = by_choice(ask_streamed(plain_server, route, body))
        off = by_choice(ask_streamed(server, route, body | OFF))
        events, scores = ask_streamed(server, route, body), []
        if status is not None:
            events, scores = split_stream(events)
        if off == by_choice(events) == plain:
            break
    assert off == plain
    assert by_choice(events) == plain
    if status is not None:
        assert {score["status"] for score in scores} == {status}
        assert len(scores) == len([key for key in plain if key])
        assert_no_false_warning(scores)


def assert_no_false_warning(scores):
    for score in scores:
        assert all(warning.startswith("a grammar forced tokens") for warning in score["warnings"]), score


@pytest.mark.parametrize("route", BODIES)
def test_streamed_and_whole_are_scored_alike(server, route):
    _, (whole,) = without_score(ask(server, route, BODIES[route]))
    _, (streamed,) = split_stream(ask_streamed(server, route, BODIES[route]))
    for name in ("tokens", "log_probability", "log_grad_norm_sq", "entropy"):
        assert streamed[name] == pytest.approx(whole[name], abs=1e-4), name
