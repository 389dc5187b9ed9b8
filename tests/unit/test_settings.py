import pytest
from pydantic import ValidationError

from gnuq_serve.service.settings import CONFIG_VARIABLE, Settings, SettingsError, load_settings


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)


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
    with pytest.raises(SettingsError, match=r"scorer_threads: .*; unknown key 'x'"):
        load_settings(written(tmp_path, "scorer_threads: 0\nx: 1"))


def test_missing_file(tmp_path):
    with pytest.raises(SettingsError, match=r"GNUQ_CONFIG=.*absent\.yaml: .*No such file"):
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
