"""A request and the settings of a calibration give the same parts where answers come about in the same way."""

import hashlib

import pytest

from gnuq_serve.calibration.answers import Sampling
from gnuq_serve.calibration.binding import chat_parts, completion_parts, sampling_part, system_part, template_part
from gnuq_serve.calibration.collecting import fingerprint_parts
from gnuq_serve.calibration.questions import Question

GREEDY = "temperature=0 top_p=1 max_tokens=256"


def question(*messages, **fields):
    return Question(key="k", path=None, line=1, messages=messages or (user("Why?"),), **fields)


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


@pytest.mark.parametrize(
    ("request_", "defaults", "part"),
    [
        ({"temperature": 0, "max_tokens": 256}, {}, GREEDY),
        ({"temperature": 0.0, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "max_tokens": 256}, {}, GREEDY),
        ({"temperature": "0", "max_completion_tokens": 256, "max_tokens": 9}, {}, GREEDY),
        ({"temperature": 0, "max_tokens": 256}, None, GREEDY),
        ({}, {}, "temperature=1 top_p=1 max_tokens=none"),
        ({}, None, "temperature=unknown top_p=unknown max_tokens=unknown"),
        ({}, {"temperature": 0.7, "top_p": 0.8, "max_tokens": 99}, "temperature=0.7 top_p=0.8 max_tokens=99"),
        ({"temperature": 0.5}, {"top_k": 20}, "temperature=0.5 top_p=1 max_tokens=none"),
        ({"top_k": 20}, {"top_k": 20}, "temperature=1 top_p=1 max_tokens=none"),
        ({"top_k": -1}, {}, "temperature=1 top_p=1 max_tokens=none"),
        ({"top_k": 5}, {"top_k": 20}, "temperature=1 top_p=1 max_tokens=none top_k=5"),
        (
            {"temperature": 0, "repetition_penalty": 1.2, "max_tokens": 256},
            {},
            f"{GREEDY} repetition_penalty=1.2",
        ),
        ({"temperature": 0, "presence_penalty": 0, "seed": 4, "n": 3, "max_tokens": 256}, {}, GREEDY),
        ({"temperature": 0, "stop": [], "logit_bias": None, "max_tokens": 256}, {}, GREEDY),
    ],
)
def test_sampling(request_, defaults, part):
    assert sampling_part(request_, defaults) == part


@pytest.mark.parametrize(
    "more",
    [{"stop": ["\n"]}, {"logit_bias": {"5": 1}}, {"response_format": {"type": "json_object"}}, {"min_tokens": 3}],
)
def test_what_else_changes_the_answer_is_told_apart(more):
    request = {"temperature": 0, "max_tokens": 256}
    assert sampling_part(request | more, {}).startswith(f"{GREEDY} {next(iter(more))}=")
    assert "\n" not in sampling_part(request | more, {})


def test_the_system_prompt_is_a_digest_of_its_text():
    digest = hashlib.sha256(b"Be brief.").hexdigest()[:12]
    assert system_part([system("Be brief."), user("Why?")]) == digest
    assert system_part([system([{"type": "text", "text": "Be brief."}])]) == digest
    assert system_part([{"role": "developer", "content": "Be brief."}]) == digest
    assert system_part([user("Be brief.")]) == system_part([]) == system_part(["odd", None]) == "none"


def test_the_template_is_default_until_something_changes_it():
    plain = {"messages": [], "tools": [], "tool_choice": "auto", "add_generation_prompt": True, "documents": None}
    assert template_part(plain) == template_part({}) == "default"
    changed = [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "low"},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function"}], "tool_choice": "required"},
        {"continue_final_message": True, "add_generation_prompt": False},
    ]
    assert len({template_part(one) for one in changed} | {"default"}) == len(changed) + 1


def test_a_completion_is_no_chat():
    parts = completion_parts({"prompt": "Why?", "temperature": 0}, {})
    assert parts == {
        "sampling": "temperature=0 top_p=1 max_tokens=16",
        "system_prompt": "none",
        "template": "no chat",
    }


def test_calibrate_and_server_agree():
    bound = fingerprint_parts(
        Sampling(max_tokens=64),
        [question(system("Be brief."), user("Why?")), question(system("Be brief."), user("How?"))],
        {"chat_template_kwargs": {"x": 1}, "top_k": 3, "temperature": 0.5},
    )
    served = {"messages": [system("Be brief."), user("When?")], "temperature": 0.5, "max_completion_tokens": 64}
    served |= {"top_k": 3, "chat_template_kwargs": {"x": 1}, "stream": True, "model": "m", "n": 2}
    assert bound == chat_parts(served, {}) == chat_parts(served, {"top_p": 1.0, "repetition_penalty": 1.1})


def test_what_the_questions_differ_in_is_not_bound():
    parts = fingerprint_parts(Sampling(), [question(system("A")), question(system("B"))])
    assert parts == {"sampling": GREEDY, "template": "default"}
    assert fingerprint_parts(Sampling(), [question(), question(system("B"))]) == parts
    given = fingerprint_parts(Sampling(), [question(), question(answer="So.")])
    assert given == {"system_prompt": "none", "template": "default"}
    assert fingerprint_parts(Sampling(), []) == {}
