"""A tiny model that a scorer process can load, and one such process for all tests of a file."""

import tempfile
from pathlib import Path

import pytest

pytest.register_assert_rewrite("live_scorer")


@pytest.fixture(scope="session")
def model_path(tiny_llama, tmp_path_factory):
    import torch
    from live_scorer import VOCABULARY

    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(vocab_size=VOCABULARY, dtype=torch.float32).save_pretrained(path)
    return str(path)


@pytest.fixture
def own_temp_folder(tmp_path_factory, monkeypatch):
    """Where the sockets are made; short, since the path of a Unix socket holds 107 bytes."""
    tmp_path_factory.getbasetemp()  # pytest's own folder is not to be made in this one
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture(scope="module")
def running(model_path):
    from live_scorer import START_SECONDS, Running

    from gnuq_serve.service.served import ServedModel

    running = Running(ServedModel(model=model_path, dtype="float32"), deadline_seconds=START_SECONDS)
    try:
        running.wait_for("ready", "failed")
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def in_process(model_path):
    """The same model's scorer, in the process of the tests."""
    from gnuq_serve.scorer import Scorer

    return Scorer.from_pretrained(model_path, dtype="float32", device="cpu")
