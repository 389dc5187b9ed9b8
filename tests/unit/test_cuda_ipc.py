"""Handles of GPU memory: plain values, and clear refusals. What needs a GPU is in the integration tests."""

import mmap

import msgspec
import pytest
import torch

from gnuq_serve.weights.cuda_ipc import CudaStorage, CudaStorages, exported, opened
from gnuq_serve.weights.layout import Layout, SharedWeights, TensorView
from gnuq_serve.weights.shared import SharedSource
from gnuq_serve.weights.shared_file import MappedFile, SharedFile
from gnuq_serve.weights.source import SourceRefused

HANDLE = CudaStorage(bytes(range(256)), 2**33, 512, b"/torch_1_2_3", 7)
ELSEWHERE = CudaStorages("00000000-0000-0000-0000-000000000000", (HANDLE, HANDLE))


def test_handles_go_through_json():
    layout = Layout({"w": TensorView(1, 3, (2, 2), (2, 1), "bfloat16")}, {}, (8, 8))
    weights = SharedWeights("/proc/1/fd/3", layout, ELSEWHERE, (1, 2), -0.5, 2)
    encoded = msgspec.json.encode(weights)
    assert encoded.isascii()
    assert msgspec.json.decode(encoded, type=SharedWeights) == weights


def test_memory_of_a_cpu_is_not_exported():
    with pytest.raises(SourceRefused, match="not all in the memory of one CUDA device"):
        exported([torch.UntypedStorage(8)])


def test_a_gpu_that_is_not_seen_is_named():
    with pytest.raises(SourceRefused, match=rf"on the GPU {ELSEWHERE.gpu}.*CUDA_VISIBLE_DEVICES"):
        opened(ELSEWHERE)


def test_the_source_refuses_such_weights(tiny_llama, tmp_path):
    tiny_llama(dtype=torch.float32).config.save_pretrained(tmp_path)
    file = SharedFile(())
    weights = SharedWeights(file.path, Layout({}, {}, (8,)), ELSEWHERE)
    with pytest.raises(SourceRefused, match="which the scorer does not see"):
        SharedSource(weights, str(tmp_path), dtype="float32").load()


def test_a_file_for_the_version_alone():
    file = SharedFile(())
    assert file.size == mmap.PAGESIZE
    mapped = MappedFile(file.path)
    file.begin_change()
    assert mapped.version is None
    file.end_change()
    assert mapped.version == 2
