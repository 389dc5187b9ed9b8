"""Each sentence that the code can give as a reason has a code of its own; a new one needs a line in the table."""

import ast
from pathlib import Path

import pytest

import gnuq_serve
from gnuq_serve.service.consistency import check_log_probability
from gnuq_serve.service.seeing.reasons import OTHER, reason_code, warning_code
from gnuq_serve.uncertainty import Uncertainty

PACKAGE = Path(gnuq_serve.__file__).parent
SOURCES = [path for path in (PACKAGE / "service").rglob("*.py") if path.name != "proxied_model.py"]
SOURCES += [PACKAGE / "scorer.py", PACKAGE / "uncertainty.py"]
SOURCES += [PACKAGE / "gradnorm" / "runner.py", PACKAGE / "calibration" / "artefact.py"]
REASON_CALLS = {"skipped", "failed", "skip", "OutOfMemory", "close"}
REASON_ERRORS = {"QueueFullError", "DeadlineError", "ScorerUnavailableError", "ResultStoreError"}
REASON_FUNCTIONS = {"_skip_reason", "problem_with", "_why_late"}

WARNING_FUNCTIONS = {"why_none"}


def sentences(expression):
    """The texts that an expression can be, numbers and names in them put as 7."""
    match expression:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            yield "".join(part.value if isinstance(part, ast.Constant) else "7" for part in parts)
        case ast.IfExp(body=one, orelse=other):
            yield from sentences(one)
            yield from sentences(other)


def name_of(function):
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)


def reasons_in(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and name_of(node.func) in REASON_CALLS | REASON_ERRORS:
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                yield from sentences(argument)
        elif isinstance(node, ast.FunctionDef) and node.name in REASON_FUNCTIONS:
            for inner in ast.walk(node):
                is_reason = isinstance(inner, ast.Assign) and name_of(inner.targets[0]) == "why"
                if is_reason or (isinstance(inner, ast.Return) and inner.value is not None):
                    yield from sentences(inner.value)


def warnings_in(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and name_of(node.func) == "append":
            if isinstance(node.func, ast.Attribute) and name_of(node.func.value) == "warnings":
                yield from sentences(node.args[0])
        elif isinstance(node, ast.FunctionDef) and node.name in WARNING_FUNCTIONS:
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    yield from sentences(inner.value)
        elif isinstance(node, ast.Assign) and "warning" in (name_of(node.targets[0]) or "").lower():
            yield from sentences(node.value)


def collect(find):
    return sorted({one for path in SOURCES for one in find(ast.parse(path.read_text(encoding="utf-8")))})


def test_reasons_are_found_in_the_code():
    found = collect(reasons_in)
    assert any(one.startswith("the scoring queue is full") for one in found)
    assert any(one.startswith("adapter not loaded") for one in found)
    assert any(one.startswith("the scorer has not 7 within") for one in found)
    assert len(found) > 15


@pytest.mark.parametrize("sentence", collect(reasons_in))
def test_each_reason_has_a_code(sentence):
    # The one placeholder that stands for a word, not a number.
    assert reason_code(sentence.replace("has not 7 within", "has not answered within")) not in {OTHER, ""}


@pytest.mark.parametrize("sentence", collect(warnings_in))
def test_each_warning_has_a_code(sentence):
    assert warning_code(sentence) != OTHER


def test_the_warning_of_disagreement():
    score = Uncertainty(status="scored", tokens=3, log_probability=-3.0)
    (warning,) = check_log_probability(score, -1.0, "float32").warnings
    assert warning_code(warning) == "disagreement"


@pytest.mark.parametrize(
    ("sentence", "code"), [(None, ""), ("", ""), ("the weather", OTHER), ("x" * 10_000, OTHER)]
)
def test_what_is_not_in_the_table(sentence, code):
    assert reason_code(sentence) == code
