"""Weights that one process shares and another reads: over a mapped file; over CUDA IPC where there is a GPU."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused_engine import SharingEngine
from shared_reader import digest
from transformers import LlamaConfig

from gnuq_serve.scorer import Sample, Scorer
from gnuq_serve.weights.empty import empty_model

PROMPT, ANSWER = [5, 3, 9, 40], [7, 8, 9]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GIB = 2**30


class Reader:
    """The other process."""

    def __init__(self):
        script = str(Path(__file__).with_name("shared_reader.py"))
        self.process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *words):
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise AssertionError(f"the reader ended (exit code {self.process.wait()})")


@pytest.fixture
def reader():
    reader = Reader()
    yield reader
    reader.process.stdin.close()
    reader.process.wait(60)
    reader.process.stdout.close()


def tensors_of(model):
    return [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]


def digests_of(model):
    return {name: digest(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("device", DEVICES)
def test_another_process_reads_the_same_and_sees_changes(reader, device, tiny_llama, tmp_path):
    first, second = (tiny_llama(tied=True, dtype=torch.float32, seed=seed, vocab_size=97) for seed in (0, 1))
    first.save_pretrained(tmp_path)
    engine = SharingEngine(first.config, tensors_of(first), device)
    before = digest(engine.engine.layers[0].qkv)
    *_, where = reader.ask("open", engine.json, str(tmp_path), "float32")
    assert where == device
    assert reader.ask("digests") == digests_of(first)
    assert reader.ask("version") == 0
    (expected,) = Scorer.from_model(first.to(device)).score([Sample(PROMPT, ANSWER)])
    found = reader.ask("score", PROMPT, ANSWER)
    assert found == pytest.approx([expected.log_probability, expected.log_grad_norm_sq], rel=1e-6)
    assert reader.ask("digests") == digests_of(first)
    assert digest(engine.engine.layers[0].qkv) == before  # scoring wrote nothing
    engine.reload(tensors_of(second), whole=False)
    assert reader.ask("version") is None
    engine.file.end_change()
    assert reader.ask("version") == 2
    assert reader.ask("digests") == digests_of(second)


@pytest.mark.gpu
def test_a_second_process_takes_no_second_copy(reader, tmp_path):
    """A model of 1.1 billion parameters with random weights in bfloat16."""
    if torch.cuda.mem_get_info()[0] < 8 * GIB:
        pytest.skip("needs 8 GiB of free GPU memory")
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path)
    shapes = empty_model(config, dtype=torch.bfloat16, trust_remote_code=False)
    shapes.tie_weights()
    made = (
        (name, 0.02 * torch.randn(p.shape, device="cuda", dtype=torch.bfloat16))
        for name, p in shapes.named_parameters()
    )
    engine = SharingEngine(config, made, "cuda", torch.bfloat16)
    torch.cuda.empty_cache()
    own, of_device, _ = reader.ask("open", engine.json, str(tmp_path), "bfloat16")
    weights = 2 * sum(parameter.numel() for parameter in shapes.parameters())
    print(
        f"weights {weights / GIB:.2f} GiB; opened by another process: {own / 2**20:.1f} MiB more by torch, "
        f"{of_device / 2**20:.1f} MiB more of the device"
    )
    assert weights > 2e9
    assert own < 0.01 * weights
    assert of_device < 0.05 * weights  # some is the driver's, for the mapping and for kernels
    log_probability, log_grad_norm_sq = reader.ask("score", PROMPT, ANSWER)
    assert log_probability < 0
    assert math.isfinite(log_grad_norm_sq)
