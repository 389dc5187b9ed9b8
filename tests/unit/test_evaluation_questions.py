"""Question sets, prompts, and which answers are right."""

import json
from collections import Counter
from pathlib import Path

import pytest

from gnuq_serve.calibration.questions import CHOICE_PROMPT
from gnuq_serve.calibration.row_reader import DataError
from gnuq_serve.evaluation.correctness import closest, is_right, token_f1
from gnuq_serve.evaluation.prompts import Prompter, read_percentage
from gnuq_serve.evaluation.question_sets import read_sets

QUESTIONS = Path(__file__).parents[1] / "questions"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_tasks_follow_from_the_fields():
    tasks = {one.name: (one.task, len(one.cases)) for one in read_sets(str(QUESTIONS))}
    assert tasks == {
        "facts:open": ("open", 12),
        "myths:binary": ("binary", 8),
        "school:choice": ("choice", 6),
        "sums:number": ("number", 8),
    }


def test_a_file_can_be_read_as_two_tasks():
    myths = QUESTIONS / "myths.jsonl"
    binary, as_open = read_sets(f"{myths}:binary,{myths}:open")
    assert all(len(case.choices) == 2 for case in binary.cases)
    assert all(case.choices == () for case in as_open.cases)
    with pytest.raises(DataError, match="twice"):
        read_sets(f"{myths}:binary,{myths}")


def test_choices_are_shuffled_by_a_seed_and_the_label_follows(tmp_path):
    rows = [{"question": f"q{i}", "choices": ["right", "a", "b", "c"], "label": 0} for i in range(200)]
    data = write(tmp_path / "s.jsonl", rows)
    (one,) = read_sets(data)
    places = [case.question.reference.label for case in one.cases]
    assert all(case.choices[place] == "right" for case, place in zip(one.cases, places, strict=True))
    assert min(Counter(places).values()) > 30  # of 50 expected
    assert Counter(places).keys() == {0, 1, 2, 3}
    assert [case.choices for case in read_sets(data)[0].cases] == [case.choices for case in one.cases]
    assert [case.choices for case in read_sets(data, seed=1)[0].cases] != [case.choices for case in one.cases]
    # The prompt shows the bare question.
    assert one.cases[0].question.messages == ({"role": "user", "content": "q0"},)


def test_the_same_question_with_other_choices_is_another_question(tmp_path):
    rows = [
        {"question": "q", "choices": ["a", "b"], "label": 0},
        {"question": "q", "choices": ["c", "d"], "label": 0},
    ]
    (one,) = read_sets(write(tmp_path / "s.jsonl", [*rows, rows[0]]))
    assert len({case.key for case in one.cases}) == len(one.cases) == 2
    assert one.left_out == 1


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path):
    rows = [
        {"question": "a", "answers": ["x"]},
        {"question": "b", "answers": [], "answerable": False},
        {"question": "c", "answers": []},
    ]
    (one,) = read_sets(write(tmp_path / "s.jsonl", rows))
    assert [case.question.text for case in one.cases] == ["a"]
    assert one.left_out == 2


def test_shots_are_kept_out_of_the_questions():
    (one,) = read_sets(str(QUESTIONS / "facts.jsonl"), shots=4)
    assert len(one.cases) == 8
    assert len(one.shots) == 4
    assert not {case.key for case in one.shots} & {case.key for case in one.cases}
    (fewer,) = read_sets(str(QUESTIONS / "facts.jsonl"), shots=4, limit=3)
    assert {case.key for case in fewer.cases} < {case.key for case in one.cases}
    assert fewer.shots == one.shots
    with pytest.raises(DataError, match="few-shot"):
        read_sets(str(QUESTIONS / "facts.jsonl"), shots=12)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("nowhere.jsonl", "No such file"),
        ("a.jsonl:guess", "'guess' is no task"),
        ("sums.jsonl:choice", "no row is"),
    ],
)
def test_what_cannot_be_read_is_said(names, says, monkeypatch):
    monkeypatch.chdir(QUESTIONS)
    with pytest.raises(DataError, match=says):
        read_sets(names)


def test_a_chat_asks_the_question_as_it_is():
    (one,) = read_sets(str(QUESTIONS / "facts.jsonl"), system="Be brief.")
    prompt = Prompter().question(one.cases[0])
    assert prompt.content == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    assert (prompt.lead, prompt.stop) == ("", "")
    asked = Prompter().p_true(one.cases[0], "Paris").content
    assert asked[0] == prompt.content[0]
    assert asked[1]["content"].startswith("Question: What is the capital of France?\nProposed answer: Paris\n")


def test_a_base_model_gets_answered_examples():
    (one,) = read_sets(str(QUESTIONS / "facts.jsonl"), shots=2, system="Be brief.")
    prompter = Prompter(one.shots)
    first, second = ((case.question.text, case.question.reference.answers[0]) for case in one.shots)
    case = one.cases[0]
    prompt = prompter.question(case)
    assert prompt.content == (
        f"Be brief.\n\nQuestion: {first[0]}\nAnswer: {first[1]}\n\nQuestion: {second[0]}\nAnswer: {second[1]}\n\n"
        f"Question: {case.question.text}\nAnswer:"
    )
    assert (prompt.lead, prompt.stop) == (" ", "\n")
    # The first example is right, the second one has the first one's answer.
    truth = prompter.p_true(case, "x").content
    assert f"Question: {first[0]}\nProposed answer: {first[1]}\nTrue or false: True" in truth
    assert f"Question: {second[0]}\nProposed answer: {first[1]}\nTrue or false: False" in truth
    assert truth.endswith("Proposed answer: x\nTrue or false:")


def test_letters_stand_for_the_choices_where_these_are_shown():
    (one,) = read_sets(str(QUESTIONS / "school.jsonl"), letters=CHOICE_PROMPT)
    case = one.cases[0]
    shown = case.question.messages[-1]["content"]
    assert f"A. {case.choices[0]}\nB. {case.choices[1]}" in shown
    assert Prompter(letters=True).answers_of(case) == ["A", "B", "C", "D"]
    assert Prompter().answers_of(case) == list(case.choices)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("95", 0.95),
        ("I am 80% sure.", 0.8),
        ("0.7", 0.7),
        ("1", 0.01),
        ("1.0", 1.0),
        ("0.5%", 0.005),
        ("100 percent", 1.0),
        ("No idea", None),
        ("250", None),
    ],
)
def test_a_stated_confidence_is_read(text, share):
    assert read_percentage(text) == (None if share is None else pytest.approx(share))


def test_which_answers_are_right():
    sets = {one.task: one for one in read_sets(str(QUESTIONS))}
    paris = sets["open"].cases[0].question
    assert is_right("open", "contains", paris, "It is Paris.", None)
    assert not is_right("open", "exact", paris, "It is Paris.", None)
    assert is_right("number", "contains", sets["number"].cases[0].question, "2 + 2 = 4.", None)
    assert not is_right("number", "contains", sets["number"].cases[0].question, "2 + 2 = 5.", None)
    school = sets["choice"].cases[0].question
    assert is_right("choice", "contains", school, "", school.reference.label)
    assert not is_right("choice", "contains", school, "", None)
    (myths,) = read_sets(f"{QUESTIONS / 'myths.jsonl'}:open")
    bulls = myths.cases[3].question
    assert is_right("open", "contains", bulls, "They do not react to a particular colour.", None)
    assert not is_right("open", "contains", bulls, "They get angry at red.", None)


def test_token_f1_is_squads():
    # Of "cat sat" and "cat sat on mat" two words are shared: precision 1, recall 1/2.
    assert token_f1("The cat sat.", "the cat sat on a mat") == pytest.approx(2 / 3)
    assert token_f1("dog", "cat") == 0
    assert not closest("neither", ("right",), ["wrong"])  # a draw
