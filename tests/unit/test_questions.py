"""Questions from JSON Lines and CSV: every kind of row, every mistake with its place and remedy."""

import csv
import json
from collections import Counter

import pytest

from gnuq_serve.calibration.questions import read_questions
from gnuq_serve.calibration.row_reader import DataError

SCORED = {"status": "scored", "log_probability": -1.5, "tokens": 3}
OPEN = {"question": "Capital of France?", "answers": ["Paris", "Paname"]}
CHOICES = ["read it all", "find a partner", "take notes", "run"]


@pytest.fixture
def write(tmp_path):
    def to_file(*rows, name="data.jsonl"):
        path = tmp_path / name
        if name.endswith(".csv"):
            columns = list(dict.fromkeys(column for row in rows for column in row))
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return to_file


def test_an_open_question(write):
    (question,) = read_questions(write({**OPEN, "id": "q1"}))
    assert question.messages == ({"role": "user", "content": "Capital of France?"},)
    assert question.reference.answers == ("Paris", "Paname")
    assert question.text == "Capital of France?"
    assert question.extra == {"id": "q1"}
    assert (question.answer, question.correct, question.uncertainty, question.group) == (None, None, None, None)


def test_jsonl_and_csv_read_the_same(write):
    rows = [
        {**OPEN, "topic": "geo, or not"},
        {"question": 'A "quoted"\nquestion', "choices": CHOICES, "label": 2, "topic": "b"},
        {"question": "q", "answer": "a", "correct": True, "topic": "b"},
        {"uncertainty": SCORED, "correct": False, "topic": "c"},
    ]
    cells = [
        {**rows[0], "answers": "Paris|Paname"},
        {**rows[1], "choices": json.dumps(CHOICES), "label": "C"},
        {**rows[2], "correct": "yes"},
        {"uncertainty": json.dumps(SCORED), "correct": "0", "topic": "c"},
    ]
    from_json = read_questions(write(*rows), group="topic")
    from_csv = read_questions(write(*cells, name="data.csv"), group="topic")
    strip = [(q.key, q.messages, q.reference, q.answer, q.correct, q.uncertainty, q.group) for q in from_json]
    assert strip == [
        (q.key, q.messages, q.reference, q.answer, q.correct, q.uncertainty, q.group) for q in from_csv
    ]
    assert [q.group for q in from_json] == ["geo, or not", "b", "b", "c"]


def test_choices_are_lettered_in_an_order_that_does_not_follow_the_file(write):
    rows = [{"question": f"Question {n}?", "choices": CHOICES, "label": 0} for n in range(400)]
    questions = read_questions(write(*rows))
    for question in questions:
        reference = question.reference
        assert reference.choices[reference.label] == CHOICES[0]
        assert sorted(reference.choices) == sorted(CHOICES)
        assert reference.answers == (CHOICES[0],)
        shown = question.messages[0]["content"].splitlines()
        assert shown[2:6] == [f"{letter}. {text}" for letter, text in zip("ABCD", reference.choices, strict=True)]
    # 400 fair draws of four: 100 each, standard deviation 8.7.
    places = Counter(question.reference.label for question in questions)
    assert set(places) == {0, 1, 2, 3}
    assert all(60 <= count <= 140 for count in places.values())


def test_the_order_of_choices_is_that_of_the_seed_and_the_question(write):
    rows = [{"question": f"Question {n}?", "choices": CHOICES, "label": 0} for n in range(40)]
    first = [q.key for q in read_questions(write(*rows), seed=1)]
    assert first == [q.key for q in read_questions(write(*rows), seed=1)]
    assert first != [q.key for q in read_questions(write(*rows), seed=2)]
    # Another row before it moves nothing.
    assert [q.key for q in read_questions(write(OPEN, *rows), seed=1)][1:] == first


def test_choices_can_stay_unseen(write):
    (question,) = read_questions(write({"question": "Q?", "choices": CHOICES, "label": 1}), show_choices=False)
    assert question.messages[0]["content"] == "Q?"
    assert question.reference.answers == ("find a partner",)


def test_choices_of_an_answer_that_was_given_keep_the_order_of_the_file(write):
    (question,) = read_questions(write({"question": "Q?", "choices": CHOICES, "label": 1, "answer": "B"}))
    assert (question.reference.choices, question.reference.label) == (tuple(CHOICES), 1)
    assert question.messages[0]["content"] == "Q?"


def test_the_right_choice_may_be_named_by_its_text(write):
    row = {"question": "Q?", "choices": CHOICES, "answers": ["take notes"]}
    (question,) = read_questions(write(row), show_choices=False)
    assert question.reference.label == 2


def test_a_conversation(write):
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    (question,) = read_questions(write({"messages": chat, "answers": "yes"}), system="Be brief.")
    assert question.messages == ({"role": "system", "content": "Be brief."}, *chat)
    assert question.text == "And now?"


def test_the_key_follows_what_the_model_is_asked(write):
    def key(**changes):
        return read_questions(write({**OPEN, **changes}))[0].key

    assert key() == key(answers=["Lyon"], id=7)
    assert len({key(), key(question="Capital of France"), key(answer="Paris"), key(answer="Lyon")}) == 4
    assert read_questions(write(OPEN), system="Be brief.")[0].key != key()


def test_unlabelled_rows_of_a_log_are_known_as_such(write):
    log = write({"uncertainty": SCORED, "correct": None}, {"uncertainty": SCORED, "correct": True})
    assert [question.labelled for question in read_questions(log)] == [False, True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": ["x"]}, r"`question` is missing"),
        ({"question": " ", "answers": ["x"]}, r"`question` is empty"),
        ({"question": 3, "answers": ["x"]}, r"`question` must be a text, not 3"),
        ({"question": "q"}, r"`answers` is missing"),
        ({"question": "q", "answers": [""]}, r"`answers` is missing"),
        ({"question": "q", "answer": "a"}, r"`answers` is missing.*name reference answers `answers`"),
        ({"question": "q", "answers": {"a": 1}}, r"`answers` must be a text or a list of texts"),
        ({"question": "q", "answers": [True]}, r"`answers` must be"),
        ({"question": "q", "correct": True}, r"`answer` is missing"),
        ({"question": "q", "answer": "a", "correct": "maybe"}, r"`correct` must be true or false, not 'maybe'"),
        ({"question": "q", "choices": ["a"], "label": 0}, r"`choices` holds 1 texts"),
        ({"question": "q", "choices": ["a", "b"]}, r"`label` is missing"),
        ({"question": "q", "choices": ["a", "b"], "label": 2}, r"`label` is 2, but there are 2 choices"),
        ({"question": "q", "choices": ["a", "b"], "label": -1}, r"`label` must be the index"),
        ({"uncertainty": SCORED}, r"`correct` is missing"),
        ({"uncertainty": {"tokens": 3}, "correct": True}, r"`uncertainty` status is None"),
        ({"uncertainty": "high", "correct": True}, r"`uncertainty` must be the object"),
        ({"messages": [], "answers": ["x"]}, r"`messages` must be a list"),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "answers": ["x"]},
            r"`messages` ends with the assistant's turn; put that into `answer`",
        ),
    ],
)
def test_a_mistake_is_named_with_file_line_and_field(write, row, message):
    with pytest.raises(DataError, match=r"data\.jsonl, line 2: " + message):
        read_questions(write(OPEN, row))


def test_a_missing_group_is_named_with_the_columns_there_are(write):
    with pytest.raises(DataError, match=r"line 2: `topic` is missing; --group names it; columns here: question"):
        read_questions(write({**OPEN, "topic": 1}, OPEN), group="topic")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"\n\n", "no rows"),
        ("a.jsonl", b'{"question": "q"\n', "line 1: not JSON"),
        ("a.jsonl", b'[{"question": "q",\n', "not one big array"),
        ("a.jsonl", b"[1]\n", "line 1: one JSON object a line is expected, not list"),
        ("a.jsonl", b'{"question": "\xff"}\n', "not UTF-8"),
        ("a.csv", b"question,answers\na,b\nc,d,e\n", "line 3: more cells"),
        ("a.csv", b'question,answers\na,"b" c\n', "line 2: not CSV"),
        ("a.csv", b'question,answers\n"a\nb",c\nd,\n', "line 4: `answers` is missing"),
        ("a.csv", b"question,uncertainty,correct\na,{x,1\n", "line 2: `uncertainty` is not JSON"),
    ],
)
def test_a_file_that_is_not_what_it_should_be(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_questions(tmp_path / name)


def test_no_such_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: No such file"):
        read_questions(tmp_path / "none.jsonl")


def test_a_byte_order_mark_as_spreadsheets_write_it(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("\ufeffquestion,answers\nq,a\n".encode())
    assert read_questions(path)[0].reference.answers == ("a",)
