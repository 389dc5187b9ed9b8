"""A server that could not keep what its settings promise does not start."""

import os
import subprocess
import sys
from types import ModuleType

import pytest
from made_calibration import saved

from gnuq_serve import cli
from gnuq_serve.vllm.guard import guard
from gnuq_serve.vllm.plugin import GnuqPlugin

GRPC = "vllm.entrypoints.launchers.grpc_server"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("GNUQ_", "VLLM_USE_RUST"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_PLUGINS", "other,gnuq")
    monkeypatch.delitem(sys.modules, GRPC, raising=False)
    yield monkeypatch
    sys.modules.pop(GRPC, None)


BAD = [
    ({"GNUQ_ON_UNCERTAIN": "abstain"}, "on_uncertain: abstain needs a decision on each answer"),
    ({"GNUQ_ON_UNCERTAIN": "abstain", "GNUQ_POLICY": "{answer: 0.8}"}, "p_correct comes from a calibration"),
    ({"GNUQ_ON_FAILURE": "closed", "GNUQ_SCORE_FRACTION": "0.5"}, "set score_fraction to 1"),
    ({"GNUQ_ON_FAILURE": "closed", "VLLM_USE_RUST_FRONTEND": "1"}, "VLLM_USE_RUST_FRONTEND=1 answers without"),
    ({"GNUQ_CALIBRATIONS": "{faq: nowhere.json}"}, "calibrations.faq: nowhere.json"),
    ({"GNUQ_ON_UNCERTIAN": "abstain"}, "did you mean 'GNUQ_ON_UNCERTAIN'"),
    ({"GNUQ_CONFIG": "nowhere.yaml"}, "nowhere.yaml"),
]


@pytest.mark.parametrize(("variables", "said"), BAD)
def test_neither_by_hand_nor_by_our_command(environment, capsys, variables, said):
    for name, value in variables.items():
        environment.setenv(name, value)
    for start in (guard, GnuqPlugin):  # vLLM logs an Exception and goes on; this one ends it
        with pytest.raises(SystemExit, match=f"gnuq: .*{said}"):
            start()
    environment.setattr(os, "execve", lambda *_: pytest.fail("it was started"))
    assert cli.main(["serve", "some/model"]) == 1
    assert said in capsys.readouterr().err


def test_a_plugin_that_vllm_could_not_import_stops_it_too(environment):
    environment.setitem(sys.modules, "gnuq_serve.vllm.plugin", None)
    with pytest.raises(SystemExit, match=r"gnuq: import of gnuq_serve\.vllm\.plugin halted"):
        guard()


def test_where_our_plugin_is_not_wanted_the_guard_keeps_still(environment):
    environment.setenv("GNUQ_ON_UNCERTAIN", "abstain")
    for plugins in ("", "other", "gnuqq"):
        environment.setenv("VLLM_PLUGINS", plugins)
        guard()
    environment.delenv("VLLM_PLUGINS")
    guard()


def test_vllms_grpc_server_is_not_let_in(environment):
    guard()
    assert GRPC not in sys.modules  # nothing is gated
    environment.setenv("GNUQ_ON_FAILURE", "closed")
    guard()
    with pytest.raises(SystemExit, match="serve without --grpc"):
        from vllm.entrypoints.launchers.grpc_server import serve_grpc  # noqa: F401


def test_nor_where_it_is_the_program_itself(environment):
    environment.setenv("GNUQ_UNSCORED_ROUTES", "block")
    main = ModuleType("__main__")
    main.__spec__ = type("Spec", (), {"name": GRPC})()
    environment.setitem(sys.modules, "__main__", main)
    with pytest.raises(SystemExit, match="gRPC answers come without a score"):
        guard()


def test_a_gating_plugin_is_there_whatever_is_served(environment, tmp_path, caplog):
    assert GnuqPlugin().required_tasks == ("generate",)
    environment.setenv("GNUQ_CALIBRATIONS", f"{{faq: {saved(tmp_path)}}}")
    environment.setenv("GNUQ_ON_UNCERTAIN", "abstain")
    assert GnuqPlugin().required_tasks is None
    assert caplog.text == ""
    environment.setenv("GNUQ_UNSCORED_ROUTES", "pass")
    assert GnuqPlugin().required_tasks == ("generate",)
    assert "unscored_routes: pass lets answers out that nothing judges" in caplog.text


def test_the_guard_needs_neither_torch_nor_vllm():
    """vLLM calls it in every process."""
    code = (
        "import sys; from gnuq_serve.vllm.guard import guard; guard(); print({'torch', 'vllm'} & {*sys.modules})"
    )
    environment = os.environ | {"GNUQ_ON_FAILURE": "closed"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "set()"
