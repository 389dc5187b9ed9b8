import os
import subprocess
import sys

import pytest

from gnuq_serve import cli
from gnuq_serve.service.settings.model import CONFIG_VARIABLE
from gnuq_serve.vllm import serve as serve_module
from gnuq_serve.vllm.serve import plugin_list


class Point:
    def __init__(self, name):
        self.name = name


@pytest.fixture
def executed(monkeypatch):
    """Calls of ``os.execve``, which does not replace this process."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return calls


def test_plugins_on_by_default_stay_on(monkeypatch):
    groups = {
        "vllm.general_plugins": [Point("zeta"), Point("alpha")],
        "vllm.platform_plugins": [Point("alpha")],
        "vllm.endpoint_plugins": [Point("never_asked_for"), Point("gnuq")],
    }
    monkeypatch.setattr(serve_module, "entry_points", lambda group: groups.get(group, []))
    assert plugin_list(None) == "alpha,gnuq,zeta"


@pytest.mark.parametrize(
    ("current", "expected"), [("", "gnuq"), ("b,a", "a,b,gnuq"), ("gnuq", "gnuq"), ("a,,gnuq,", "a,gnuq")]
)
def test_a_list_of_the_users_own_only_gains_ours(current, expected):
    assert plugin_list(current) == expected


def test_serve_becomes_the_server_with_the_plugin_on(executed, tmp_path):
    config = tmp_path / "gnuq.yaml"
    config.write_text("scorer_threads: 2")
    before, after = ["some/model", "--port", "8001"], ["--hf-overrides", '{"a": 1}', "--enforce-eager"]
    assert cli.main(["serve", *before, "--gnuq-config", str(config), *after]) == 0
    ((program, command, environment),) = executed
    assert program == sys.executable
    assert command[1:] == ["-m", "gnuq_serve.vllm.server_main", *before, *after]
    assert "gnuq" in environment["VLLM_PLUGINS"].split(",")
    assert environment[CONFIG_VARIABLE] == str(config)
    assert environment["PATH"] == os.environ["PATH"]


def test_serve_keeps_the_environments_config_and_plugins(executed, monkeypatch, tmp_path):
    config = tmp_path / "gnuq.yaml"
    config.write_text("")
    monkeypatch.setenv(CONFIG_VARIABLE, str(config))
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    assert cli.main(["serve", "some/model"]) == 0
    environment = executed[0][2]
    assert environment["VLLM_PLUGINS"] == "gnuq,mine"
    assert environment[CONFIG_VARIABLE] == str(config)


def test_shared_weights_want_flags_of_vllm(executed, capsys):
    asked = ["serve", "some/model", "--gnuq-scorer-weights", "shared"]
    assert cli.main(asked) == 0
    command = executed[0][1]
    extension = "gnuq_serve.vllm.worker_extension.GnuqWorkerExtension"
    assert command[3:] == ["some/model", "--load-format", "gnuq", "--worker-extension-cls", extension]
    for flag, words in {
        "--load-format": ["--load_format", "dummy"],
        "--worker-extension-cls": ["--worker-extension-cls=mine.Extension"],
    }.items():
        assert cli.main([*asked, *words]) != 0
        assert f"scorer_weights: shared sets {flag} itself" in capsys.readouterr().err
    assert len(executed) == 1


def test_our_flags_become_variables_and_vllm_gets_its_own(executed):
    given = ["--gnuq-max-queue", "7", "--no-gnuq-mirror-in-logprobs", "--gnuq-mode=answer_only"]
    assert cli.main(["serve", "some/model", *given, "--max-num-seqs", "8", "--help=queue"]) == 0
    ((_, command, environment),) = executed
    assert command[3:] == ["some/model", "--max-num-seqs", "8", "--help=queue"]
    names = ("GNUQ_MAX_QUEUE", "GNUQ_MIRROR_IN_LOGPROBS", "GNUQ_MODE")
    assert [environment[name] for name in names] == ["7", "false", "answer_only"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--gnuq-max-queus=1", "unknown flag --gnuq-max-queus; did you mean '--gnuq-max-queue'"),
        ("--gnuq_mode", "did you mean '--gnuq-mode'"),
        ("--no-gnuq-mirror-in-logprob", "did you mean '--no-gnuq-mirror-in-logprobs'"),
    ],
)
def test_an_unknown_flag_of_ours_never_reaches_vllm(executed, capsys, flag, message):
    with pytest.raises(SystemExit):
        cli.main(["serve", "some/model", flag])
    assert message in capsys.readouterr().err
    assert executed == []


def test_help_is_ours_and_tells_of_vllms(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "some/model", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--gnuq-max-queue" in out
    assert "--help=all" in out


@pytest.mark.parametrize(
    "content", [None, "scorer_thread: 2", "scorer_threads: 0", "- a", "a: [\nb: {", "\t\n- :\n ::"]
)
def test_a_bad_config_is_told_in_one_line_before_anything_starts(executed, tmp_path, capsys, content):
    config = tmp_path / "gnuq.yaml"
    if content is not None:
        config.write_text(content)
    assert cli.main(["serve", "some/model", "--gnuq-config", str(config)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gnuq-serve: ")
    assert str(config) in err
    assert err.count("\n") == 1
    assert executed == []


def test_a_bad_config_named_in_the_environment(executed, monkeypatch, capsys):
    monkeypatch.setenv(CONFIG_VARIABLE, "/nowhere/gnuq.yaml")
    assert cli.main(["serve", "some/model"]) == 1
    assert "/nowhere/gnuq.yaml" in capsys.readouterr().err
    assert executed == []


@pytest.mark.parametrize("argv", [[], ["dance"], ["demo-model", "--port", "1"]])
def test_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: gnuq-serve" in capsys.readouterr().err


def test_demo_model_prints_its_path_or_the_reason(monkeypatch, capsys):
    from gnuq_serve import demo_model

    monkeypatch.setattr(demo_model, "ensure_demo_model", lambda: "/cache/model")
    assert cli.main(["demo-model"]) == 0
    assert capsys.readouterr().out == "/cache/model\n"

    def fails():
        raise demo_model.DemoModelError("no network")

    monkeypatch.setattr(demo_model, "ensure_demo_model", fails)
    assert cli.main(["demo-model"]) == 1
    assert capsys.readouterr().err == "gnuq-serve: no network\n"


def test_the_command_line_needs_the_base_package_alone():
    heavy = {"torch", "vllm", "starlette", "zmq", "msgspec", "prometheus_client", "scipy", "httpx"}
    script = f"import gnuq_serve.cli, sys; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
