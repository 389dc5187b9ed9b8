"""Where the real scorer process gets its weights, what memory they take there, and what it says of them."""

import asyncio
import tempfile

import msgspec
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from gnuq_serve.cache import default_cache
from gnuq_serve.service.answer import Answer
from gnuq_serve.service.scorer.client import ScorerClient
from gnuq_serve.service.scorer.messages import ScorerConfig
from gnuq_serve.service.served import ServedModel
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings.model import load_settings

START_SECONDS = 120.0  # importing torch and transformers on a busy machine
MIB = 2**20


@pytest.fixture(autouse=True)
def own_folders(monkeypatch):
    """The cache, on a disk as caches are; and where the sockets are made, by a short path as they need."""
    default_cache().mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=default_cache()) as cache,
        tempfile.TemporaryDirectory(prefix="t") as folder,
    ):
        monkeypatch.setenv("GNUQ_CACHE", cache)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory):
    """A checkpoint of 32 MiB; 64 MiB in float32."""
    path = tmp_path_factory.mktemp("models") / "bfloat16"
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    return str(path)


def own_mib(process):
    """Memory of the process alone, save pages of mapped files, which the kernel can take back."""
    return sum(region.anonymous for region in process.memory_maps(grouped=False)) / MIB


def run(config):
    """One scorer process: its state, a score, and its own memory at rest."""

    async def go():
        before = set(psutil.Process().children())
        client = ScorerClient(config)
        client.start()
        try:
            score = await client.score([3, 1, 4, 1, 5], [9, 2, 6], START_SECONDS)
            (process,) = set(psutil.Process().children()) - before
            lowest = own_mib(process)
            for _ in range(10):  # it lets go of what the pass took when it is at rest
                await asyncio.sleep(0.1)
                lowest = min(lowest, own_mib(process))
            return client.state, score, lowest
        finally:
            await client.stop()

    return asyncio.run(go())


def test_a_mapped_checkpoint_of_another_dtype_takes_no_memory_of_its_own(bfloat16):
    config = ScorerConfig(model=bfloat16, served_model=bfloat16, dtype="float32", device="cpu")
    copied, expected, with_copy = run(msgspec.structs.replace(config, weights="checkpoint"))
    mapped, found, without = run(config)
    weights = copied.memory.weights
    assert weights > 60 * MIB
    assert copied.memory.own_weights == weights
    assert mapped.memory.own_weights == 0
    # Measured by the kernel: a copy takes the weights' size more, the mapped one at most a tenth of it.
    assert with_copy - without == pytest.approx(weights / MIB, abs=weights / MIB / 10)
    assert mapped.weights == copied.weights == "checkpoint"
    assert mapped.fingerprint == copied.fingerprint
    assert found.log_probability == expected.log_probability
    assert found.log_grad_norm_sq == pytest.approx(expected.log_grad_norm_sq, abs=1e-6)


def test_what_scoring_needs_is_said_at_start(bfloat16, caplog, capfd):
    split = ScorerConfig(
        model=bfloat16, served_model=bfloat16, device="cpu", memory_budget="300MiB", engine_workers=2
    )
    with caplog.at_level("INFO", "gnuq_serve"):
        state, *_ = run(split)
    said = capfd.readouterr().err
    assert "split over 2 workers, where no scorer can read them" in said
    assert "a copy of its own, on one device" in said
    memory = state.memory
    assert memory.budget == 300 * MIB
    assert memory.pass_tokens == 2048
    assert 0 < memory.pass_bytes <= memory.budget
    assert f"the scorer's memory: {memory}" in caplog.text
    assert "weights 0.03 GiB (0.00 GiB its own)" in caplog.text


def test_every_score_of_quantised_weights_says_so(bfloat16):
    settings = load_settings(flags={"scorer_model": bfloat16, "scorer_device": "cpu"})
    served = ServedModel(model=bfloat16, dtype="float32", quantization="fp8")

    async def score():
        service = UncertaintyService(settings.model_copy(update={"deadline_seconds": START_SECONDS}))
        service.start(served)
        try:
            return await service.score([Answer([1, 2], [3]), Answer([4], [5, 6])])
        finally:
            await service.stop()

    for result in asyncio.run(score()):
        assert result["status"] == "scored"
        (warning,) = result["warnings"]
        assert warning.startswith("approximate_weights: ")
        assert "fp8" in warning
