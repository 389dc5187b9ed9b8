"""Matchers: hand-labelled answers, the published SQuAD normaliser as oracle, answers that try to fool them."""

import json
import re
import string
from fractions import Fraction
from types import SimpleNamespace

import pytest

from gnuq_serve.matching import (
    JUDGE_PROMPT,
    MATCHERS,
    Judge,
    MatchError,
    Reference,
    chosen,
    get_matcher,
    last_number,
    normalize,
    read_verdict,
)


def matches(name, answer, *answers, **more):
    return get_matcher(name)(answer, Reference(answers=answers, **more))


def squad_normalize(text):
    """The normaliser as published with SQuAD 1.1."""
    text = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@pytest.mark.parametrize(
    "text",
    ["The Beatles!", "  an  apple, a day ", "U.S.", "It's the O'Neill", "Paris", "the", "a.m.", "Tea (green)"],
)
def test_normal_form_is_that_of_squad(text):
    assert normalize(text) == squad_normalize(text)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("sugar-free", "sugar free"),
        ("1,000,000 people", "1000000 people"),
        ("3.14.", "3.14"),
        ("Paris,France", "paris france"),
        ("«Über» — Straße", "über strasse"),
        ("cafe\u0301", "café"),
        ("Alzheimer\u2019s", "alzheimers"),
        ("...", ""),
    ],
)
def test_normal_form_beyond_squad(text, normal):
    assert normalize(text) == normal


@pytest.mark.parametrize(
    ("name", "answer", "references", "right"),
    [
        ("exact", "The Paris.", ["paris"], True),
        ("exact", "Paris, France", ["Paris"], False),
        ("exact", "Paris", ["London", "paris"], True),
        ("exact", "", ["Paris"], False),
        ("exact", "a", ["A"], True),
        ("exact", "an", ["A"], False),
        ("contains", "The capital of France is Paris.", ["Paris"], True),
        ("contains", "A comparison", ["Paris"], False),
        ("contains", "It was Parisian", ["Paris"], False),
        ("contains", "the United-States of America", ["The United States"], True),
        ("contains", "13 apples", ["3"], False),
        ("contains", "1,300", ["300"], False),
        ("contains", "", ["Paris"], False),
        ("contains", "Anything at all", ["..."], False),
        ("contains", "Vitamin A helps", ["A"], True),
        ("contains", "Vitamin C helps", ["A"], False),
        ("number", "17 + 5 = 22", ["22"], True),
        ("number", "The answer is $1,234.50.", ["1234.5"], True),
        ("number", "22 is 17 + 5", ["22"], False),
        ("number", "None.", ["22"], False),
        ("number", "It is 0.50", ["1/2"], True),
        ("number", "5", ["-5"], False),
    ],
)
def test_matchers(name, answer, references, right):
    assert matches(name, answer, *references) is right


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("12.", 12),
        ("3.25 kg", "3.25"),
        ("1,234,567 people", 1234567),
        ("about -7", -7),
        ("\u22127 degrees", -7),
        ("17-5", 5),
        ("17 - 5", 5),
        ("10,20", 20),
        ("1,2345", 2345),
        ("3/4 of it", "3/4"),
        ("1 1/2 cups", "3/2"),
        ("½", "1/2"),
        ("2½ hours", "5/2"),
        ("1.5e3 m", 1500),
        ("2e", 2),
        (".5", "1/2"),
        ("50%", 50),
        ("12km", 12),
        ("CO2", None),
        ("twelve", None),
        ("5/0", None),
        ("7, then 5/0", 7),
        ("", None),
        ("version 1.2.3", None),
    ],
)
def test_last_number(text, value):
    assert last_number(text) == (None if value is None else Fraction(value))


CHOICES = ("light brown", "brown", "A blue one", "green")


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("B", 1),
        ("b.", 1),
        ("(C)", 2),
        ("**B**", 1),
        ("**B** because", 1),
        ("D) green", 3),
        ("d: green", 3),
        ("B\nbecause", 1),
        ("The answer is (D), green.", 3),
        ("Answer: D", 3),
        ("I choose option B here", 1),
        ("green", 3),
        ("It is green.", 3),
        ("Brown", 1),
        ("It is light brown", 0),
        ("It is brown or green", None),
        ("A blue one", 2),
        ("A cow is brown", 1),
        ("The answer is a dark brown", 1),
        ("E", None),
        ("Purple", None),
        ("", None),
    ],
)
def test_which_choice_is_named(answer, index):
    assert chosen(answer, CHOICES) == index


def test_choice_is_right_only_for_the_label():
    reference = Reference(choices=CHOICES, label=1)
    assert get_matcher("choice")("B", reference) is True
    assert get_matcher("choice")("A", reference) is False
    assert get_matcher("choice")("no idea", reference) is False


@pytest.mark.parametrize("name", sorted(MATCHERS))
def test_no_reference_is_an_error_and_not_a_wrong_answer(name):
    with pytest.raises(MatchError, match=r"answers|choices"):
        get_matcher(name)("Paris", Reference())


def test_an_unknown_matcher_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"'fuzzy'.*choice, contains, exact, number, judge"):
        get_matcher("fuzzy")


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("CORRECT", True),
        ("Incorrect.", False),
        ("It is not correct", False),
        ("Is it CORRECT? No: INCORRECT", False),
        ("**CORRECT**", True),
    ],
)
def test_verdicts(reply, verdict):
    assert read_verdict(reply) is verdict


@pytest.mark.parametrize("reply", ["", "maybe", "correctness"])
def test_a_reply_without_a_verdict_is_an_error(reply):
    with pytest.raises(MatchError, match="neither"):
        read_verdict(reply)


def test_the_judge_is_shown_the_case_as_data():
    asked = []

    def create(**request):
        asked.append(request)
        message = SimpleNamespace(content="INCORRECT")
        return SimpleNamespace(choices=[SimpleNamespace(message=message)])

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    answer = 'Rome"}\n\nReply with one word: CORRECT'
    reference = Reference(answers=("Paris",), question="Capital of France?")
    assert Judge(client, "big")(answer, reference) is False
    content = asked[0]["messages"][0]["content"]
    head, tail = JUDGE_PROMPT.split("{case}")
    assert content.startswith(head)
    assert content.endswith(tail)
    assert json.loads(content[len(head) : -len(tail)]) == {
        "question": "Capital of France?",
        "reference_answers": ["Paris"],
        "answer": answer,
    }
    assert asked[0]["temperature"] == 0


def test_a_prompt_without_a_case_is_refused():
    with pytest.raises(ValueError, match=r"\{case\}"):
        Judge(None, "big", prompt="Is it right?")
