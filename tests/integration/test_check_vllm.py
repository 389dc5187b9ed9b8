"""`gnuq-serve check-vllm` against the vLLM that is installed."""

import pytest

from gnuq_serve import cli
from gnuq_serve.vllm import compatibility, relied_on
from gnuq_serve.vllm.compatibility import assigned_attributes, check_vllm

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def test_the_installed_version_has_all_that_we_rely_on(capsys):
    code = cli.main(["check-vllm"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ok ", "NO "))]
    assert [line for line in lines if line.startswith("NO")] == []
    assert len(lines) > 20
    assert code == 0


def test_what_is_missing_is_named(monkeypatch):
    """A table that asks for more than there is: each finding says what, and the others go on."""
    monkeypatch.setattr(relied_on, "FIELDS", {("vllm.outputs", "NoSuchClass"): "a"})
    monkeypatch.setattr(relied_on, "ATTRIBUTES", {("vllm.outputs", "CompletionOutput"): "token_ids no_such"})
    monkeypatch.setattr(relied_on, "SOURCES", {"no such words": "vllm.outputs"})
    monkeypatch.setattr(relied_on, "FLAGS", "host no_such_flag")
    monkeypatch.setattr(relied_on, "TESTED", ("0.1",))
    monkeypatch.setattr(
        compatibility, "answering_route", lambda scope: "other" if "responses" in scope["path"] else None
    )
    problems = {finding.what: finding.problem for finding in check_vllm()}
    assert cli.main(["check-vllm"]) == 1
    assert problems.pop("application: our routes, behind the API key") is None
    assert "tested with 0.1" in problems[f"version {compatibility.installed_version()}"]
    assert problems["command line"] == "missing: no_such_flag"
    assert "/v1/responses" in problems["routes: each known to answer or not to"]
    assert problems["fields of NoSuchClass"].startswith("AttributeError")
    assert problems["attributes of CompletionOutput"] == "missing: no_such"
    assert problems["source of vllm.outputs"] == "'no such words' is not there"


def test_a_plugin_that_is_not_loaded_is_noticed(monkeypatch):
    monkeypatch.setattr(compatibility, "_environment", lambda **_: pytest.MonkeyPatch.context())
    monkeypatch.setenv("VLLM_PLUGINS", "")
    problems = [finding.problem for finding in check_vllm() if finding.what.startswith("application")]
    assert "the plugin was not loaded" in problems[0]


def test_attributes_are_found_in_bases_and_methods():
    class Base:
        def __init__(self):
            self.early = 1
            other = Base
            other.not_mine = 2

    class Derived(Base):
        annotated: int

        @property
        def shown(self):
            self.late: int = 3

    found = assigned_attributes(Derived)
    assert {"early", "late", "annotated", "shown"} <= found
    assert "not_mine" not in found
