import copy

import pytest

from gnuq_serve.service.requests.request_plan import ROUTES, InvalidRequestError, RequestOptions, plan_request

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0.5}
TEXT = {"model": "m", "prompt": "Hi", "max_tokens": 4}
BOTH = pytest.mark.parametrize(("route", "request_body"), [("chat", CHAT), ("completion", TEXT)])


def test_routes():
    assert ROUTES == {"/v1/chat/completions": "chat", "/v1/completions": "completion"}


@BOTH
def test_a_plain_request_gains_token_ids_and_logprobs(route, request_body):
    before = copy.deepcopy(request_body)
    plan = plan_request(route, request_body)
    logprobs = True if route == "chat" else 0
    assert plan.body == request_body | {"return_token_ids": True, "logprobs": logprobs}
    assert type(plan.body["logprobs"]) is type(logprobs)
    assert (plan.route, plan.unscored, plan.skip) == (route, None, None)
    assert (plan.keep_token_ids, plan.keep_logprobs, plan.comparable) == (False, False, True)
    assert request_body == before


@BOTH
@pytest.mark.parametrize(
    "field", [None, True, {}, {"mode": None}, {"trace": False, "semantic": False, "wait": True}]
)
def test_our_field_is_taken_out(route, request_body, field):
    plan = plan_request(route, request_body | {"uncertainty": field})
    assert plan == plan_request(route, request_body)


@BOTH
@pytest.mark.parametrize(
    "extra", [{}, {"stream": True}, {"logprobs": 1, "return_token_ids": True}, {"echo": True}]
)
def test_opt_out_leaves_everything_else_as_it_is(route, request_body, extra):
    plan = plan_request(route, request_body | extra | {"uncertainty": False})
    assert plan.unscored == "off"
    assert plan.body == request_body | extra


@BOTH
def test_streams_are_asked_for_the_same(route, request_body):
    plan = plan_request(route, request_body | {"stream": True, "uncertainty": True})
    whole = plan_request(route, request_body)
    assert plan.body == whole.body | {"stream": True}
    assert (plan.unscored, plan.skip) == (None, None)


@BOTH
@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"model": "lora-a"}, "adapter"),
    ],
)
def test_what_cannot_be_scored_is_skipped_with_a_reason(route, request_body, extra, reason):
    plan = plan_request(route, request_body | extra, ["lora-a"])
    assert reason in plan.skip
    assert plan.unscored is None
    assert plan.body == request_body | extra  # vLLM is asked what the client asked


@BOTH
def test_skipped_answers_keep_what_the_client_asked_for(route, request_body):
    asked = request_body | {"model": "lora-a", "logprobs": 1, "return_token_ids": True}
    plan = plan_request(route, asked, ["lora-a"])
    assert plan.skip is not None
    assert plan.keep_logprobs
    assert plan.keep_token_ids


@BOTH
def test_harmless_values_of_those_fields(route, request_body):
    harmless = {"echo": False, "include_reasoning": True, "prompt_embeds": None}
    assert plan_request(route, request_body | harmless, {"lora-a": object()}).skip is None


@BOTH
@pytest.mark.parametrize("model", [None, 7, ["m"], {"a": 1}])
def test_a_model_that_is_no_name_is_left_to_vllm(route, request_body, model):
    assert plan_request(route, request_body | {"model": model}, {"lora-a": object()}).skip is None


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "image_embeds", "image_embeds": ""},
        {"type": "input_audio", "input_audio": {}},
        {"type": "audio_url", "audio_url": {}},
        {"type": "video_url", "video_url": {}},
    ],
)
def test_media_are_skipped_wherever_they_stand(part):
    history = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "And?"},
    ]
    assert "image, audio or video" in plan_request("chat", CHAT | {"messages": history}).skip
    # the text route has no messages
    assert plan_request("completion", TEXT | {"messages": history}).skip is None


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "text",
        [],
        [None],
        ["x"],
        [{"role": "user"}],
        [{"content": [1, None, {"type": "text", "text": "a"}, {}]}],
    ],
)
def test_odd_messages_are_left_to_vllm(messages):
    plan = plan_request("chat", CHAT | {"messages": messages})
    assert plan.skip is None
    assert plan.body["messages"] == messages


@pytest.mark.parametrize("prompt", ["Hi", ["Hi", "Ho"], [1, 2, 3], [[1, 2], [3]]])
def test_every_form_of_prompt_is_passed_on(prompt):
    plan = plan_request("completion", TEXT | {"prompt": prompt, "n": 2})
    assert plan.body["prompt"] == prompt
    assert plan.skip is None


@pytest.mark.parametrize("extra", [{"logprobs": True}, {"logprobs": True, "top_logprobs": 3}])
def test_chat_logprobs_asked_for_are_kept(extra):
    plan = plan_request("chat", CHAT | extra)
    assert plan.body == CHAT | extra | {"return_token_ids": True}
    assert plan.keep_logprobs
    assert plan.comparable


@pytest.mark.parametrize("asked", [None, False])
def test_chat_logprobs_not_asked_for_are_ours(asked):
    plan = plan_request("chat", CHAT | {"logprobs": asked})
    assert plan.body["logprobs"] is True
    assert not plan.keep_logprobs


@pytest.mark.parametrize("asked", [0, 1, 5])
def test_completion_logprobs_asked_for_are_kept(asked):
    plan = plan_request("completion", TEXT | {"logprobs": asked})
    assert plan.body["logprobs"] == asked
    assert plan.keep_logprobs  # 0 asks for the logprob of the token that was chosen
    assert plan.comparable


@pytest.mark.parametrize("logprobs", [{}, {"logprobs": None}, {"logprobs": False}])
def test_top_logprobs_alone_stays_vllms_error(logprobs):
    plan = plan_request("chat", CHAT | {"top_logprobs": 2} | logprobs)
    assert plan.body == CHAT | {"top_logprobs": 2, "return_token_ids": True} | logprobs
    assert not plan.comparable


@BOTH
def test_logprob_token_ids_alone_stays_vllms_error(route, request_body):
    plan = plan_request(route, request_body | {"logprob_token_ids": [3, 4]})
    assert "logprobs" not in plan.body
    assert not plan.comparable


def test_top_logprobs_of_zero_is_no_wish():
    assert plan_request("chat", CHAT | {"top_logprobs": 0}).body["logprobs"] is True


@BOTH
@pytest.mark.parametrize(("asked", "kept"), [(True, True), (False, False), (None, False)])
def test_token_ids_asked_for_are_kept(route, request_body, asked, kept):
    plan = plan_request(route, request_body | {"return_token_ids": asked})
    assert plan.body["return_token_ids"] is True
    assert plan.keep_token_ids is kept


@BOTH
@pytest.mark.parametrize(
    "extra",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    ],
)
def test_logprobs_under_a_grammar_are_not_compared(route, request_body, extra):
    plan = plan_request(route, request_body | extra)
    assert not plan.comparable
    assert plan.skip is None


@BOTH
@pytest.mark.parametrize(
    "extra",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"response_format": "odd"},
        {"structured_outputs": None},
        {"tool_choice": "auto"},
        {"tool_choice": "none"},
    ],
)
def test_no_grammar(route, request_body, extra):
    assert plan_request(route, request_body | extra).comparable


@BOTH
@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("yes", "must be true, false or an object of options, not 'yes'"),
        (0, "not 0"),
        ([], "must be true, false or an object"),
        ({"modes": "exact"}, "uncertainty.modes is unknown; options: mode, trace, semantic, thinking, wait"),
        ({"mode": "fast"}, "uncertainty.mode='fast' is not supported; use 'exact' or 'answer_only'"),
        ({"mode": ["exact"]}, "is not supported; use 'exact' or 'answer_only'"),
        ({"trace": 1}, "uncertainty.trace=1 is not supported; use False or True"),
        ({"semantic": "yes"}, "uncertainty.semantic='yes' is not supported"),
        ({"wait": "no"}, "uncertainty.wait='no' is not supported; use True or False"),
        ({"wait": 1}, "uncertainty.wait=1 is not supported; use True or False"),
        ({"thinking": None}, "uncertainty.thinking=None is not supported; use False or True"),
    ],
)
def test_wrong_options_say_what_is_right(route, request_body, field, message):
    with pytest.raises(InvalidRequestError) as caught:
        plan_request(route, request_body | {"uncertainty": field})
    assert message in str(caught.value)


def test_a_long_wrong_value_is_cut():
    with pytest.raises(InvalidRequestError) as caught:
        plan_request("chat", CHAT | {"uncertainty": "x" * 10_000})
    assert len(str(caught.value)) < 200


@BOTH
@pytest.mark.parametrize(
    ("field", "options"),
    [
        (True, RequestOptions()),
        ({"wait": False}, RequestOptions(wait=False)),
        ({"thinking": True, "mode": "exact"}, RequestOptions(thinking=True, mode="exact")),
        ({"mode": "answer_only", "trace": True}, RequestOptions(mode="answer_only", trace=True)),
        ({"mode": None, "semantic": True}, RequestOptions(semantic=True)),
    ],
)
def test_options(route, request_body, field, options):
    assert plan_request(route, request_body | {"uncertainty": field}).options == options


@pytest.mark.parametrize("value", [False, 0, "false", "no"])
def test_hidden_reasoning_is_asked_for_and_hidden_by_us(value):
    plan = plan_request("chat", CHAT | {"include_reasoning": value})
    assert plan.body["include_reasoning"] is True
    assert plan.hide_reasoning
    assert plan.skip is None


def test_without_a_parser_nothing_is_hidden():
    plan = plan_request("chat", CHAT | {"include_reasoning": False}, parses=False)
    assert plan.body["include_reasoning"] is False
    assert (plan.hide_reasoning, plan.skip) == (False, None)


@pytest.mark.parametrize(
    ("extra", "parses"),
    [
        ({}, None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, True),
        ({"response_format": {"type": "json_object"}}, True),
    ],
)
def test_where_hiding_would_change_the_answer_it_is_skipped(extra, parses):
    request = CHAT | {"include_reasoning": False} | extra
    plan = plan_request("chat", request, parses=parses)
    assert "include_reasoning=false" in plan.skip
    assert plan.body == request


@pytest.mark.parametrize(
    ("prompt", "n", "index", "text"),
    [("Hi", None, 0, "Hi"), ("Hi", 2, 1, "Hi"), (["a", "b"], 1, 1, "b"), (["a", "b"], "2", 2, "b")],
)
def test_the_echoed_prompt_of_each_choice(prompt, n, index, text):
    plan = plan_request("completion", TEXT | {"prompt": prompt, "n": n, "echo": True})
    assert plan.skip is None
    assert plan.echo_of(index) == text
    assert "logprobs" not in plan.body  # those of a prompt are dear
    assert not plan.comparable


@pytest.mark.parametrize("prompt", ["Hi", [1, 2]])
def test_with_token_ids_vllm_itself_echoes_nothing(prompt):
    plan = plan_request("completion", TEXT | {"prompt": prompt, "echo": True, "return_token_ids": True})
    assert (plan.skip, plan.echo, plan.echo_of(0)) == (None, True, "")


def test_echo_with_logprobs_can_be_compared():
    assert plan_request("completion", TEXT | {"echo": True, "logprobs": 0}).comparable


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"prompt": [1, 2]}, "echo of a prompt of token ids"),
        ({"prompt": [[1], [2]]}, "echo of a prompt of token ids"),
        ({"truncate_prompt_tokens": 2}, "truncated"),
        ({"max_tokens": 0}, "nothing was generated"),
    ],
)
def test_echo_that_cannot_be_put_back_is_skipped(extra, reason):
    request = TEXT | {"echo": True} | extra
    plan = plan_request("completion", request)
    assert reason in plan.skip
    assert plan.body == request


@pytest.mark.parametrize("value", [False, None, "false", 0, "odd"])
def test_no_echo(value):
    plan = plan_request("completion", TEXT | {"echo": value})
    assert plan.echoed == ()
    assert plan.skip is None


def test_echo_of_a_chat_is_vllms_own():
    plan = plan_request("chat", CHAT | {"echo": True})
    assert (plan.echoed, plan.skip, plan.body["logprobs"]) == ((), None, True)


@pytest.mark.parametrize(("choice", "grammar"), [(None, True), ("auto", True), ("none", False)])
def test_a_strict_tool_is_a_grammar(choice, grammar):
    tools = [{"type": "function", "function": {"name": "f", "strict": True}}]
    assert plan_request("chat", CHAT | {"tools": tools, "tool_choice": choice}).grammar is grammar
