import argparse
import os
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gnuq_serve.service.settings.model import CONFIG_VARIABLE, Settings, SettingsError, load_settings
from gnuq_serve.service.settings.sources import add_flags, combine, flags_of, from_environment, from_flags
from gnuq_serve.service.settings.table import with_table


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    for name in [name for name in os.environ if name.startswith("GNUQ_")]:
        monkeypatch.delenv(name)


def written(tmp_path, text):
    path = tmp_path / "gnuq.yaml"
    path.write_text(text)
    return str(path)


def test_defaults():
    settings = load_settings()
    assert settings.scorer_model is None
    assert (settings.scorer_dtype, settings.scorer_device, settings.scorer_threads) == ("auto", "auto", 1)
    assert settings.max_batch_tokens == 2048
    assert settings.deadline_seconds == 30.0
    assert settings.mirror_in_logprobs is True
    assert (settings.background_deadline_seconds, settings.max_queue, settings.on_overload) == (
        300.0,
        256,
        "skip",
    )
    assert (settings.max_score_tokens, settings.keep_results, settings.keep_results_seconds) == (
        8192,
        10_000,
        86_400,
    )
    assert settings.results_path is None


def test_yaml(tmp_path):
    path = written(tmp_path, "scorer_device: cuda:1\ndeadline_seconds: 2\nmirror_in_logprobs: no\n")
    settings = load_settings(path)
    assert (settings.scorer_device, settings.deadline_seconds) == ("cuda:1", 2.0)
    assert settings.mirror_in_logprobs is False
    assert settings.scorer_threads == 1


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}\n"])
def test_an_empty_file_means_defaults(tmp_path, text):
    assert load_settings(written(tmp_path, text)) == load_settings()


def test_file_from_the_environment_and_the_argument_goes_first(tmp_path, monkeypatch):
    monkeypatch.setenv(CONFIG_VARIABLE, written(tmp_path, "scorer_threads: 3"))
    assert load_settings().scorer_threads == 3
    other = tmp_path / "other.yaml"
    other.write_text("scorer_threads: 4")
    assert load_settings(str(other)).scorer_threads == 4
    monkeypatch.setenv(CONFIG_VARIABLE, "")
    assert load_settings().scorer_threads == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("deadline: 3", "unknown key 'deadline'; did you mean 'deadline_seconds'"),
        ("scorer_modle: x", "unknown key 'scorer_modle'; did you mean 'scorer_model'"),
        ("zzz: 1", "unknown key 'zzz'; known: .*max_batch_tokens"),
        ("scorer_threads: 0", "scorer_threads: .*greater than or equal to 1"),
        ("max_batch_tokens: -5", "max_batch_tokens: "),
        ("deadline_seconds: 0", "deadline_seconds: .*greater than 0"),
        ("deadline_seconds: soon", "deadline_seconds: .*number"),
        ("mirror_in_logprobs: 7", "mirror_in_logprobs: .*boolean"),
        ("on_overload: queue", "on_overload: .*'skip' or 'wait'"),
        ("max_queue: 0", "max_queue: .*greater than or equal to 1"),
        ("max_score_tokens: 1", "max_score_tokens: .*greater than or equal to 2"),
        ("keep_results: -1", "keep_results: .*greater than or equal to 0"),
        ("- a\n- b", "expected a mapping of settings, found list"),
        ("just words", "expected a mapping of settings, found str"),
        ("a: [", "gnuq.yaml"),
        ("1: 2", "1"),
    ],
)
def test_mistakes_name_the_file_and_the_key(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings(path)
    assert path in str(caught.value)


def test_several_mistakes_are_told_at_once(tmp_path):
    with pytest.raises(SettingsError, match=r"scorer_threads: .*; .*unknown key 'x'"):
        load_settings(written(tmp_path, "scorer_threads: 0\nx: 1"))


def test_missing_file(tmp_path):
    with pytest.raises(SettingsError, match=r"--gnuq-config=.*absent\.yaml: .*No such file"):
        load_settings(str(tmp_path / "absent.yaml"))
    with pytest.raises(SettingsError):
        load_settings(str(tmp_path))  # a folder


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "gnuq.yaml"
    path.write_bytes(b"scorer_model: \xff\xfe")
    with pytest.raises(SettingsError, match=r"gnuq\.yaml"):
        load_settings(str(path))


def test_settings_do_not_change():
    with pytest.raises(ValidationError):
        Settings().scorer_threads = 2


def test_flag_before_variable_before_file(tmp_path, monkeypatch):
    path = written(tmp_path, "scorer_threads: 2\nmax_queue: 2\nkeep_results: 2\nmode: answer_only")
    monkeypatch.setenv("GNUQ_MAX_QUEUE", "3")
    monkeypatch.setenv("GNUQ_KEEP_RESULTS", "3")
    settings = load_settings(path, {"keep_results": "4"})
    assert (settings.scorer_threads, settings.max_queue, settings.keep_results) == (2, 3, 4)
    assert settings.mode == "answer_only"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("scorer_threads", "3", 3),
        ("deadline_seconds", "1.5", 1.5),
        ("mirror_in_logprobs", "false", False),
        ("on_overload", "wait", "wait"),
        ("scorer_model", "123", "123"),  # a text stays one
        ("scorer_model", "null", None),
        ("memory_budget", "2GiB", "2GiB"),
        ("memory_budget", "", None),  # an empty variable says nothing
    ],
)
def test_texts_become_values(monkeypatch, name, text, value):
    monkeypatch.setenv(f"GNUQ_{name.upper()}", text)
    assert getattr(load_settings(), name) == value
    if text:
        monkeypatch.delenv(f"GNUQ_{name.upper()}")
        assert getattr(load_settings(None, {name: text}), name) == value


class Structured(BaseModel):
    model_config = ConfigDict(extra="forbid")
    by_name: dict[str, str] = Field({}, description="Paths by name.")
    policy: dict[str, float] | str | None = Field(None, description="A mapping, or a path, at 100 %.")
    on: bool = Field(False, description="A switch.")


def test_mappings_are_yaml():
    environment = {"GNUQ_BY_NAME": "{a: x.json, b: y.json}", "GNUQ_POLICY": "{answer: 0.8}"}
    settings = combine(Structured, from_environment(Structured, environment))
    assert (settings.by_name, settings.policy) == ({"a": "x.json", "b": "y.json"}, {"answer": 0.8})
    assert combine(Structured, from_flags(Structured, {"policy": "/a/policy.yaml"})).policy == "/a/policy.yaml"
    with pytest.raises(SettingsError, match=r"^GNUQ_BY_NAME: not YAML"):
        from_environment(Structured, {"GNUQ_BY_NAME": "{a: ["})
    with pytest.raises(SettingsError, match=r"^--gnuq-policy\..*answer: .*number"):
        combine(Structured, from_flags(Structured, {"policy": "{answer: high}"}))


@pytest.mark.parametrize(
    ("variables", "flags", "message"),
    [
        ({"GNUQ_MAX_QUEUES": "1"}, {}, "^unknown variable GNUQ_MAX_QUEUES; did you mean 'GNUQ_MAX_QUEUE'"),
        ({"GNUQ_MAX_QUEUE": "0"}, {}, "^GNUQ_MAX_QUEUE: .*greater than or equal to 1"),
        ({"GNUQ_MAX_QUEUE": "0"}, {"max_queue": "-1"}, "^--gnuq-max-queue: "),  # the one that counts
        ({}, {"mode": "fast"}, "^--gnuq-mode: .*'exact' or 'answer_only'"),
        ({"GNUQ_OPERATOR_KEY": "short"}, {}, "^GNUQ_OPERATOR_KEY: is too short"),
    ],
)
def test_mistakes_name_the_place(monkeypatch, variables, flags, message):
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings(None, flags)
    assert "short'" not in str(caught.value)


def test_what_kubernetes_and_our_other_commands_set_is_no_mistake(monkeypatch):
    for name in ("GNUQ_SERVICE_HOST", "GNUQ_SERVE_SERVICE_PORT_HTTP", "GNUQ_PORT", "GNUQ_PORT_8000_TCP_ADDR"):
        monkeypatch.setenv(name, "tcp://10.0.0.1:8000")
    monkeypatch.setenv("GNUQ_CACHE", "/tmp")
    assert load_settings() == Settings()


def test_every_field_is_a_documented_flag():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, Settings)
    help_text = " ".join(parser.format_help().split())
    for name, field in Settings.model_fields.items():
        assert f"--gnuq-{name.replace('_', '-')}" in help_text
        assert field.description is not None
        assert field.description.endswith("."), name
    given = ["--gnuq-max-queue", "7", "--no-gnuq-mirror-in-logprobs", "--gnuq-config", "x.yaml"]
    assert flags_of(parser.parse_args(given)) == {"max_queue": "7", "mirror_in_logprobs": "false"}


def test_a_percent_sign_in_a_description():
    parser = argparse.ArgumentParser()
    add_flags(parser, Structured)
    assert "100 %" in parser.format_help()


def test_keys_are_not_shown():
    settings = load_settings(None, {"operator_key": "0123456789abcdef"})
    assert settings.operator_key.get_secret_value() == "0123456789abcdef"
    assert "0123456789" not in repr(settings)


def test_the_docs_table_is_the_models():
    page = Path(__file__).parents[2] / "docs" / "serving.md"
    text = page.read_text(encoding="utf-8")
    assert text == with_table(text), f"run: python -m gnuq_serve.service.settings.table {page}"
