"""The editor over the events that vLLM sends.

`vllm_events` writes them as vLLM does for a request. What the editor makes of those for the request that we send
must be those for the request that the client sent.
"""

import json
import random

import pytest

from gnuq_serve.service.requests.request_plan import plan_request
from gnuq_serve.service.responses.stream_edit import EventSplitter, StreamEditor
from gnuq_serve.uncertainty import Uncertainty

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
TEXT = {"model": "m", "prompt": "Hi", "stream": True}
HEAD = {"id": "x-1", "created": 7, "model": "m"}
PROMPT = [1, 5, 6]

# What a parser makes of each step of an answer: (token ids, delta or None where it holds them back).
PLAIN = [([10], {"content": "Par"}), ([11], {"content": "is"}), ([2], {"content": ""})]
TOOL = [
    ([20], None),
    ([21, 22], {"tool_calls": [{"index": 0, "id": "t", "function": {"name": "f"}}]}),
    ([23], None),
    ([24], {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}),
    ([25], None),
    ([2], None),
]
THINKING = [
    ([30], {"reasoning": "Fra"}),
    ([31], {"reasoning": "nce"}),
    ([32], None),
    ([33, 34], {"reasoning": " so", "content": " Paris"}),
    ([35], {"content": "."}),
    ([2], None),
]
UNFINISHED = [([30], {"reasoning": "Fra"}), ([31], {"reasoning": "nce"})]


def logprob(token):
    return -token / 64


def chat_logprobs(ids):
    return {"content": [{"token": str(i), "logprob": logprob(i), "bytes": [], "top_logprobs": []} for i in ids]}


def vllm_events(request, answers, parser=True):
    """vLLM's `chat_completion_stream_generator`, told after its source: one event each."""
    ids_wanted, wants_logprobs = bool(request.get("return_token_ids")), bool(request.get("logprobs"))
    options = request.get("stream_options") or {}
    hides = parser and request.get("include_reasoning") is False
    each = {"usage": {"prompt_tokens": 3}} if options.get("continuous_usage_stats") else {}
    events = []
    for index in range(len(answers)):
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        prompt = {"prompt_token_ids": PROMPT if ids_wanted else None, "prompt_text": None}
        events.append(HEAD | {"choices": [choice]} | prompt | each)
    for step in range(max(map(len, answers))):
        for index, answer in enumerate(answers):
            if step >= len(answer):
                continue
            ids, delta = answer[step]
            last = step == len(answer) - 1
            if hides and delta is not None:
                delta = delta | {"reasoning": None}
                if not delta.get("content") and not delta.get("tool_calls"):
                    delta = None
            logprobs = chat_logprobs(ids) if wants_logprobs and not hides else None
            if delta is None:
                if not last and logprobs is None and (not ids_wanted or hides):
                    continue
                delta = {}
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
            if last:
                choice |= {"finish_reason": "stop" if ids == [2] else "length", "stop_reason": None}
            choice["token_ids"] = ids if ids_wanted and not hides else None
            events.append(HEAD | {"choices": [choice]} | each)
    if options.get("include_usage"):
        events.append(HEAD | {"choices": [], "usage": {"prompt_tokens": 3}})
    return events


def text_events(request, answers):
    """The same of `completion_stream_generator`; the answers are those of a list of prompts, n each."""
    ids_wanted, n = bool(request.get("return_token_ids")), request.get("n") or 1
    prompts = request["prompt"] if isinstance(request["prompt"], list) else [request["prompt"]]
    events = []
    for step in range(max(map(len, answers))):
        for index, answer in enumerate(answers):
            if step >= len(answer):
                continue
            ids, delta = answer[step]
            text, reported = delta["content"], ids
            if request.get("echo") and step == 0:
                text, reported = ("" if ids_wanted else prompts[index // n]) + text, PROMPT + ids
            values = [None if i == PROMPT[0] else logprob(i) for i in reported]
            logprobs = {"tokens": [*map(str, reported)], "token_logprobs": values}
            choice = {
                "index": index,
                "text": text,
                "logprobs": logprobs if request.get("logprobs") is not None else None,
                "finish_reason": "stop" if ids == [2] else None,
                "stop_reason": None,
                # vLLM sends those of an echoed prompt unasked
                "prompt_token_ids": PROMPT if step == 0 and (ids_wanted or request.get("echo")) else None,
                "token_ids": ids if ids_wanted else None,
            }
            events.append(HEAD | {"object": "text_completion", "choices": [choice]})
    return events


def sse(data):
    return f"data: {json.dumps(data)}\n\n".encode()


def edited(plan, events):
    """The editor and what the client gets of these events."""
    editor = StreamEditor(plan)
    results = [editor.edit(sse(event)) for event in events]
    return editor, [json.loads(result.removeprefix(b"data: ")) for result in results if result is not None]


WISHES = [
    {},
    {"logprobs": True},
    {"return_token_ids": True},
    {"logprobs": True, "top_logprobs": 1, "return_token_ids": True},
    {"include_reasoning": False},
    {"include_reasoning": False, "logprobs": True, "return_token_ids": True},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "return_token_ids": False},
]


@pytest.mark.parametrize("wish", WISHES, ids=str)
@pytest.mark.parametrize(
    "answers",
    [[PLAIN], [TOOL], [THINKING], [UNFINISHED], [PLAIN, TOOL, THINKING]],
    ids=["plain", "tool", "thinking", "cut off", "three"],
)
def test_the_client_sees_what_vllm_would_have_sent(wish, answers):
    request = CHAT | wish
    plan = plan_request("chat", request)
    _, seen = edited(plan, vllm_events(plan.body, answers))
    assert seen == vllm_events(request, answers)


@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_the_same_without_a_parser(wish):
    request = CHAT | wish
    plan = plan_request("chat", request, parses=False)
    _, seen = edited(plan, vllm_events(plan.body, [PLAIN, PLAIN[:2]], parser=False))
    assert seen == vllm_events(request, [PLAIN, PLAIN[:2]], parser=False)


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"logprobs": 0},
        {"return_token_ids": True},
        {"echo": True},
        {"echo": True, "logprobs": 1},
        {"echo": True, "logprobs": 1, "return_token_ids": True},
        {"echo": True, "prompt": ["a", "b"], "n": 2},
    ],
    ids=str,
)
def test_completions(wish):
    request = TEXT | wish
    answers = [PLAIN, PLAIN[:1], PLAIN[1:], PLAIN] if "n" in wish else [PLAIN]
    plan = plan_request("completion", request)
    _, seen = edited(plan, text_events(plan.body, answers))
    assert seen == text_events(request, answers)


@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_the_answers_are_read_whole(wish):
    plan = plan_request("chat", CHAT | wish)
    editor, _ = edited(plan, vllm_events(plan.body, [PLAIN, TOOL]))
    plain, tool = editor.answers()
    assert (plain.prompt_ids, plain.answer_ids, plain.tool_call) == (PROMPT, [10, 11, 2], False)
    assert (tool.prompt_ids, tool.answer_ids, tool.tool_call) == (PROMPT, [20, 21, 22, 23, 24, 25, 2], True)
    assert plain.answer_span.log_probability == pytest.approx(sum(map(logprob, [10, 11, 2])))


def test_echoed_logprobs_are_those_of_the_answer():
    plan = plan_request("completion", TEXT | {"echo": True, "logprobs": 0})
    editor, _ = edited(plan, text_events(plan.body, [PLAIN]))
    (answer,) = editor.answers()
    assert answer.logprobs == [*map(logprob, [10, 11, 2])]


def after_32(answer_ids, template_options):
    return answer_ids.index(32) + 1


@pytest.mark.parametrize("wish", [{}, {"include_reasoning": False}], ids=str)
def test_thinking_and_answer_are_spans_of_their_own(wish):
    plan = plan_request("chat", CHAT | wish)
    editor, _ = edited(plan, vllm_events(plan.body, [THINKING]))
    (answer,) = editor.answers(after_32)
    assert (answer.thinking_span.prompt_ids, answer.thinking_span.answer_ids) == (PROMPT, [30, 31, 32])
    assert answer.thinking_span.log_probability == pytest.approx(sum(map(logprob, [30, 31, 32])))
    assert answer.answer_span.prompt_ids == [*PROMPT, 30, 31, 32]
    assert answer.answer_span.answer_ids == [33, 34, 35, 2]
    assert answer.answer_span.log_probability == pytest.approx(sum(map(logprob, [33, 34, 35, 2])))


def test_thinking_that_does_not_end_leaves_no_answer():
    plan = plan_request("chat", CHAT)
    editor, _ = edited(plan, vllm_events(plan.body, [UNFINISHED]))
    (answer,) = editor.answers(after_32)
    assert answer.answer_span is None
    assert answer.thinking_span.answer_ids == [30, 31]


def test_where_the_boundary_is_lost_the_whole_is_scored_and_says_so():
    plan = plan_request("chat", CHAT)
    editor, _ = edited(plan, vllm_events(plan.body, [THINKING]))
    (answer,) = editor.answers()
    assert answer.thinking_span is None
    assert answer.answer_span.answer_ids == [30, 31, 32, 33, 34, 35, 2]
    assert "where the thinking ends was not found" in answer.warnings[0]


def test_the_closing_event_of_a_chat():
    plan = plan_request("chat", CHAT)
    editor, _ = edited(plan, vllm_events(plan.body, [PLAIN, TOOL]))
    scores = [Uncertainty(status="scored", id=f"unc-{i}").to_dict() for i in range(2)]
    closing = json.loads(editor.closing_event(scores, mirror=True).removeprefix(b"data: "))
    assert {name: closing[name] for name in HEAD} == HEAD
    assert "usage" not in closing
    for i, choice in enumerate(closing["choices"]):
        assert (choice["index"], choice["delta"], choice["finish_reason"]) == (i, {}, None)
        assert choice["uncertainty"] == scores[i] | {"tool_call": i == 1}
        assert choice["logprobs"] == {"content": None, "uncertainty": choice["uncertainty"]}


def test_the_closing_event_has_usage_where_every_event_has():
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    plan = plan_request("chat", CHAT | options)
    editor, _ = edited(plan, vllm_events(plan.body, [PLAIN])[:-1])
    closing = json.loads(editor.closing_event([{}], mirror=False).removeprefix(b"data: "))
    assert closing["usage"] == {"prompt_tokens": 3}


def test_the_closing_event_of_a_completion():
    plan = plan_request("completion", TEXT)
    editor, _ = edited(plan, text_events(plan.body, [PLAIN]))
    closing = json.loads(editor.closing_event([{"id": "u"}], mirror=True).removeprefix(b"data: "))
    uncertainty = {"id": "u", "tool_call": False}
    logprobs = {"tokens": None, "token_logprobs": None, "uncertainty": uncertainty}
    choice = {"index": 0, "text": "", "logprobs": logprobs, "finish_reason": None, "uncertainty": uncertainty}
    assert closing == HEAD | {"object": "text_completion", "choices": [choice]}


def test_skipped_requests_pass_as_they_are_and_are_counted():
    request = CHAT | {"model": "lora"}
    plan = plan_request("chat", request, ["lora"])
    events = vllm_events(plan.body, [TOOL, PLAIN])
    editor, seen = edited(plan, events)
    assert seen == events == vllm_events(request, [TOOL, PLAIN])
    assert editor.answers() == [None, None]


@pytest.mark.parametrize("end", [b"data: [DONE]\n\n", sse({"choices": [], "usage": {}})])
def test_the_end_is_told(end):
    editor, _ = edited(plan := plan_request("chat", CHAT), vllm_events(plan.body, [PLAIN]))
    assert editor.state == "open"
    assert editor.edit(end) == end
    assert editor.state == "finished"


@pytest.mark.parametrize("event", [b"data: {broken\n\n", sse({"error": {"message": "out"}}), b"data: 7\n\n"])
def test_after_something_unknown_everything_passes(event):
    plan = plan_request("chat", CHAT)
    editor, _ = edited(plan, vllm_events(plan.body, [PLAIN])[:2])
    later = sse(vllm_events(plan.body, [PLAIN])[2])
    assert [editor.edit(one) for one in (event, later, b"data: [DONE]\n\n")] == [
        event,
        later,
        b"data: [DONE]\n\n",
    ]
    assert editor.state == "broken"


@pytest.mark.parametrize("event", [b": keep-alive\n\n", b"event: ping\n\n", b"\n\n"])
def test_what_is_no_data_passes(event):
    assert StreamEditor(plan_request("chat", CHAT)).edit(event) == event


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_events_are_cut_whole_from_any_pieces(newline):
    rng = random.Random(3)
    texts = [": ping", "data: {}", "data: Grüße\ndata: zwei", "data: [DONE]"]
    events = [(text.encode().replace(b"\n", newline)) + 2 * newline for text in texts]
    whole = b"".join(events) + b"data: rest"
    for _ in range(50):
        splitter, found, rest = EventSplitter(), [], whole
        while rest:
            size = rng.randint(1, 12)
            found += splitter.feed(rest[:size])
            rest = rest[size:]
        assert found == events
        assert splitter.flush() == b"data: rest"
        assert splitter.flush() == b""
