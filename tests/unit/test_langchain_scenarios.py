"""The table of scenarios in docs/langchain.md is what happens."""

from __future__ import annotations

import pytest
from langchain_scenarios import BEGIN, CHAT_GNUQ, DOCS, END, SCENARIOS, WAYS, Case, scripted_reply, table
from scripted_openai import running

pytestmark = [
    pytest.mark.filterwarnings("ignore:Provided run_id be used only for the first element"),
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings"),
    pytest.mark.filterwarnings("ignore:The function `loads` is in beta"),
]


@pytest.fixture(scope="module")
def settings():
    with running(scripted_reply) as server:
        yield server.settings()


@pytest.fixture(scope="module")
def documented():
    """Outcomes by scenario and way, read from the documentation."""
    rows = DOCS.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").replace("\\|", "\0").split("|")] for row in rows[2:]]
    return {name.replace("\0", "\\|"): dict(zip(WAYS, found, strict=True)) for name, *found in cells}


@pytest.mark.parametrize("name", SCENARIOS)
async def test_the_documentation_says_what_happens(settings, documented, name):
    assert {way: await SCENARIOS[name](Case(way, settings)) for way in WAYS} == documented[name]


def test_the_documentation_has_every_scenario(documented):
    assert list(documented) == list(SCENARIOS)
    assert table(documented) in DOCS.read_text(encoding="utf-8")


def test_with_chat_gnuq_the_score_arrives_wherever_the_answer_does(documented):
    lost = [name for name, found in documented.items() if found[CHAT_GNUQ] not in {"yes", "by run id"}]
    assert lost == ["a stream that is left early"]
