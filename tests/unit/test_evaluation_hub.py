"""Question sets by the library ``datasets``: real folders of Parquet and JSON files, read as from a hub."""

import json
import os
import subprocess
import sys

import pytest

from gnuq_serve.calibration.row_reader import DataError
from gnuq_serve.evaluation.question_sets import read_sets

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The library reads a folder OWNER/NAME in the place of the hub's data set; its cache goes with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def put(path, rows):
    """Write a file of rows; Parquet by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


TRIVIA = [
    {"question": "Capital of France?", "answer": {"value": "Paris", "aliases": ["Paris", "City of Light"]}},
    {"question": "Capital of Italy?", "answer": {"value": "Rome", "aliases": []}},
]
SQUAD = [
    {"question": "Who?", "context": "Ada did.", "answers": {"text": ["Ada", "Ada"], "answer_start": [0, 0]}},
    {"question": "Why?", "context": "Ada did.", "answers": {"text": [], "answer_start": []}},
]
ARC = [
    {"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"},
    {
        "question": "Wet?",
        "choices": {"text": ["sea", "sand", "dust"], "label": ["1", "2", "3"]},
        "answerKey": "1",
    },
    {"question": "Kept back?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": ""},
]
MMLU = [{"question": "1 + 1?", "subject": "sums", "choices": ["1", "2", "3", "4"], "answer": 1}]
OURS = [{"question": "Sky?", "choices": ["red", "blue"], "label": 1, "answers": ["blue"]}]
TRUTHFUL_MC = [
    {
        "question": "Moon?",
        "mc1_targets": {"choices": ["cheese", "rock", "glass"], "labels": [0, 1, 0]},
        "mc2_targets": {"choices": ["cheese", "rock"], "labels": [0, 1]},
    }
]
TRUTHFUL = [
    {"question": "Moon?", "best_answer": "Rock", "correct_answers": ["Rock"], "incorrect_answers": ["Cheese"]}
]
BINARY = [{"question": "Moon?", "best_answer": "Rock", "best_incorrect_answer": "Cheese"}]
GSM8K = [{"question": "10 * 120?", "answer": "10 times 120 is <<10*120=1200>>1200.\n#### 1,200"}]
LISTED = [{"question": "Who wrote Emma?", "answer": ["Jane Austen", "Austen"]}]
NUMBERS = [{"question": "6 * 7?", "answer": 42}]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("rows", "task", "expected"),
    [
        (TRIVIA, "open", [("Paris", "City of Light"), ("Rome",)]),
        (SQUAD, "open", [("Ada",)]),
        (ARC, "choice", [("fire",), ("sea",)]),
        (MMLU, "choice", [("2",)]),
        (OURS, "choice", [("blue",)]),
        (TRUTHFUL_MC, "choice", [("rock",)]),
        (TRUTHFUL, "open", [("Rock",)]),
        (BINARY, "binary", [("Rock",)]),
        (GSM8K, "number", [("1200",)]),
        (LISTED, "open", [("Jane Austen", "Austen")]),
        (NUMBERS, "number", [("42",)]),
    ],
    ids=["trivia", "squad", "arc", "mmlu", "ours", "mc1", "truthful", "binary", "gsm8k", "listed", "numbers"],
)
def test_well_known_shapes_become_questions(here, rows, task, expected, ending):
    put(here / f"own/quiz/test.{ending}", rows)
    (one,) = read_sets("hub:own/quiz@test")
    assert (one.name, one.task) == (f"own/quiz@test:{task}", task)
    assert [case.question.text for case in one.cases] == [row["question"] for row in rows[: len(expected)]]
    assert [case.question.line for case in one.cases] == list(range(1, len(expected) + 1))
    assert one.left_out == len(rows) - len(expected)
    for case, answers in zip(one.cases, expected, strict=True):
        reference = case.question.reference
        if task in ("choice", "binary"):
            assert (reference.choices[reference.label],) == answers
        else:
            assert reference.answers == answers


def test_wrong_answers_come_along(here):
    put(here / "own/quiz/test.parquet", TRUTHFUL)
    (one,) = read_sets("hub:own/quiz")
    assert list(one.cases[0].question.extra["incorrect_answers"]) == ["Cheese"]


@pytest.fixture
def several(here):
    """Two configs; one split keeps its answers back."""
    folder = here / "own/quiz"
    put(folder / "trivia/train.jsonl", TRIVIA)
    put(folder / "trivia/validation.jsonl", TRIVIA[:1])
    put(folder / "trivia/test.jsonl", [{"question": "Secret?", "answer": {"value": "<unk>", "aliases": []}}])
    put(folder / "sums/train.jsonl", NUMBERS)
    write_card(
        folder,
        trivia={split: f"trivia/{split}.jsonl" for split in ("train", "validation", "test")},
        sums={"train": "sums/train.jsonl"},
    )


def write_card(folder, **configs):
    """The card of a data set, which names the files of each split of each config."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [line for split, path in splits.items() for line in (f"  - split: {split}", f"    path: {path}")]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


@pytest.mark.usefixtures("several")
def test_the_default_split_is_the_first_with_answers_and_is_said(capsys):
    both = read_sets("hub:own/quiz/trivia,hub:own/quiz/sums:open")
    assert [one.name for one in both] == ["own/quiz/trivia@validation:open", "own/quiz/sums@train:open"]
    said = capsys.readouterr().err
    assert "hub:own/quiz/trivia: split validation (test: no answers)\n" in said
    assert "hub:own/quiz/sums: split train\n" in said


@pytest.mark.usefixtures("several")
def test_a_split_that_is_named_is_read(here, capsys):
    put(here / "own.jsonl", [{"question": "Who wrote Emma?", "answers": ["Jane Austen"]}])
    sets = read_sets("own.jsonl,hub:own/quiz/trivia@train")
    assert [(one.name, len(one.cases)) for one in sets] == [("own:open", 1), ("own/quiz/trivia@train:open", 2)]
    assert "split train" not in capsys.readouterr().err
    # What is kept in a working file goes by these: another way to the same question finds it.
    (again,) = read_sets("hub:own/quiz/trivia")
    assert {case.key for case in again.cases} < {case.key for case in sets[1].cases}
    with pytest.raises(DataError, match="names a set twice"):
        read_sets("hub:own/quiz/trivia@validation,hub:own/quiz/trivia")


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("quiz", r"not of the form hub:OWNER/NAME\[/CONFIG\]\[@SPLIT\]\[:TASK\]"),
        ("own/quiz@test[:10]", "is no task"),
        ("own/quiz:guess", "'guess' is no task; tasks: open, number, choice, binary"),
        ("own/quiz", "several configs.*: trivia, sums"),
        ("own/quiz/hard", "no config 'hard'.*: trivia, sums"),
        ("own/quiz/trivia@dev", "hub:own/quiz/trivia@dev: no split 'dev'; there are: train, validation, test"),
        ("own/quiz/trivia@test", "no row of the split test names its answer.*: train, validation, test"),
        ("own/quiz/trivia@train:choice", "no row is a question of the task choice"),
    ],
)
def test_what_is_not_there_is_named_beside_what_there_is(name, says):
    with pytest.raises(DataError, match=says):
        read_sets(f"hub:{name}")


def test_rows_of_no_known_shape_are_left_out_and_if_all_are_it_is_said(here):
    put(here / "own/quiz/test.jsonl", [{"question": None, "answer": "x"}, {"question": "Who?", "answer": "Ada"}])
    (one,) = read_sets("hub:own/quiz")
    assert [(case.question.text, case.question.line) for case in one.cases] == [("Who?", 2)]
    assert one.left_out == 1
    put(here / "own/reviews/test.jsonl", [{"text": "Great.", "stars": 5}])
    with pytest.raises(DataError, match=r"none of its 1 rows fits; its columns: text, stars; .*answerKey"):
        read_sets("hub:own/reviews")


def test_splits_of_other_names_are_not_guessed(here):
    put(here / "own/quiz/part_a.jsonl", LISTED)
    put(here / "own/quiz/part_b.jsonl", LISTED)
    write_card(here / "own/quiz", default={"a": "part_a.jsonl", "b": "part_b.jsonl"})
    with pytest.raises(DataError, match="no split test or validation or train; name one with @; there are: a, b"):
        read_sets("hub:own/quiz")
    assert read_sets("hub:own/quiz@b")[0].name == "own/quiz@b:open"


def test_code_and_other_formats_are_refused(here):
    put(here / "own/quiz/test.jsonl", LISTED)
    (here / "own/quiz/quiz.py").write_text("raise SystemExit('ran')")
    with pytest.raises(DataError, match="scripts are no longer supported"):
        read_sets("hub:own/quiz")
    (here / "own/lines").mkdir(parents=True)
    (here / "own/lines/test.txt").write_text("one\n")
    with pytest.raises(DataError, match="of the kind 'text'; only Parquet, JSON and CSV"):
        read_sets("hub:own/lines")
    (here / "own/pickled").mkdir()
    (here / "own/pickled/test.pkl").write_bytes(b"")
    with pytest.raises(DataError, match=r"hub:own/pickled: No .*data files"):
        read_sets("hub:own/pickled")


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"gnuq-serve\[hub\]"):
        read_sets("hub:own/quiz")


OFFLINE = """
from gnuq_serve.calibration.row_reader import DataError
from gnuq_serve.evaluation.question_sets import read_sets

(one,) = read_sets("hub:own/quiz")
print(one.name, [case.question.reference.answers for case in one.cases])
try:
    read_sets("hub:own/absent")
except DataError as error:
    print(error)
"""


def test_offline_the_cache_is_read_and_what_it_lacks_is_said(here, tmp_path):
    put(here / "own/quiz/test.jsonl", LISTED)
    # What the library leaves behind for a hub's set of this name.
    datasets.load_dataset_builder("own/quiz").download_and_prepare(
        str(here / "cache/own___quiz/default/0.0.0/abc")
    )
    (here / "elsewhere").mkdir()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_DATASETS_CACHE": str(here / "cache"),
    }
    found = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env=environment,
        cwd=here / "elsewhere",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    read, lacks = found.stdout.splitlines()
    assert read == "own/quiz@test:open [('Jane Austen', 'Austen')]"
    assert lacks.startswith("hub:own/absent: the hub can't be reached, and the set is not in the cache (")
    assert "HF_HUB_OFFLINE" in lacks
