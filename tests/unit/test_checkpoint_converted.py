"""Weights in another dtype than the checkpoint's: converted once to a file, mapped, and equal to a plain load."""

import os
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, tiny

from gnuq_serve.weights import converted, safetensors_file
from gnuq_serve.weights.checkpoint import load_checkpoint
from gnuq_serve.weights.converted import NotConvertedError, converted_tensors
from gnuq_serve.weights.fingerprint import fingerprint_of
from gnuq_serve.weights.room import own_bytes


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of converted files."""
    monkeypatch.setenv("GNUQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(converted, "_IN_MEMORY", ())  # where tests have their files does not matter
    return tmp_path / "cache" / "weights"


@pytest.fixture
def checkpoint(tmp_path):
    """``checkpoint(family, dtype)``: the folder of a tiny model."""

    def save(family="llama", dtype=torch.bfloat16, **sizes):
        folder = tmp_path / family
        tiny(family, dtype=dtype).save_pretrained(folder, **sizes)
        return folder

    return save


def tensors_of(model):
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def assert_equal(found, expected):
    found, expected = tensors_of(found), tensors_of(expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("family", "saved", "wanted"),
    [
        *((family, "bfloat16", "float32") for family in FAMILIES),
        ("llama", "float16", "float64"),
        ("llama", "float32", "bfloat16"),
        ("gpt_oss", "bfloat16", "float16"),
    ],
)
def test_equals_a_plain_load(family, saved, wanted, checkpoint, cache):
    folder = checkpoint(family, getattr(torch, saved))
    plain = load_checkpoint(str(folder), dtype=wanted, device="cpu")
    mapped = load_checkpoint(str(folder), dtype=wanted, device="cpu", map_converted=True)
    assert_equal(mapped, plain)
    assert fingerprint_of(mapped, "exact") == fingerprint_of(plain, "exact")
    stays_in_float32 = (family, wanted) == ("gpt_oss", "float16")
    assert len(list(cache.glob("*.safetensors"))) == (0 if stays_in_float32 else 1)
    # Experts of their own in the checkpoint are put together in memory; nothing else is.
    experts = sum(p.nbytes for name, p in mapped.named_parameters() if "experts" in name)
    if not stays_in_float32:
        assert own_bytes(mapped) <= (experts if family == "mixtral" else 0)
    assert own_bytes(plain) == sum(p.nbytes for p in plain.parameters())


def test_the_checkpoints_own_dtype_needs_no_file(checkpoint, cache):
    folder = checkpoint(dtype=torch.float32)
    model = load_checkpoint(str(folder), dtype="float32", device="cpu", map_converted=True)
    assert own_bytes(model) == 0
    assert not cache.exists()


def test_auto_is_the_dtype_of_the_configuration(checkpoint, cache):
    folder = checkpoint(dtype=torch.bfloat16)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))
    model = load_checkpoint(str(folder), device="cpu", map_converted=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert own_bytes(model) == 0


def test_shards(checkpoint, cache):
    folder = checkpoint(max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = load_checkpoint(str(folder), dtype="float32", device="cpu", map_converted=True)
    assert_equal(model, load_checkpoint(str(folder), dtype="float32", device="cpu"))


def test_made_once_for_each_dtype(checkpoint, cache):
    folder = checkpoint(dtype=torch.float16)
    first = converted_tensors(str(folder), torch.float32)
    (file,) = cache.glob("*.safetensors")
    number = file.stat().st_ino
    assert file.stat().st_mode & 0o077 == 0 or cache.stat().st_mode & 0o077 == 0  # nobody else's business
    again = converted_tensors(str(folder), torch.float32)
    assert file.stat().st_ino == number
    assert all(torch.equal(first[name], again[name]) for name in first)
    converted_tensors(str(folder), torch.bfloat16)
    assert len(list(cache.glob("*.safetensors"))) == 2


def test_a_checkpoint_that_changes_is_converted_again(checkpoint, cache):
    folder = checkpoint()
    old = converted_tensors(str(folder), torch.float32)
    (before,) = cache.glob("*.safetensors")
    name = "model.norm.weight"
    kept = old[name].clone()
    changed = {n: t + 1 for n, t in load_file(folder / "model.safetensors").items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    new = converted_tensors(str(folder), torch.float32)
    (after,) = cache.glob("*.safetensors")  # the old one has gone
    assert after != before
    assert torch.equal(new[name], changed[name].float())
    assert torch.equal(old[name], kept)  # who had mapped it keeps it


def test_other_values_at_the_same_time_and_size(checkpoint, cache):
    folder = checkpoint()
    converted_tensors(str(folder), torch.float32)
    file = folder / "model.safetensors"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    changed = {n: t + 1 for n, t in load_file(file).items()}
    save_file(changed, file, {"format": "pt"})
    os.utime(file, ns=times)
    new = converted_tensors(str(folder), torch.float32)
    assert all(torch.equal(new[name], tensor.float()) for name, tensor in changed.items())


def test_a_damaged_file_is_made_again(checkpoint, cache):
    folder = checkpoint()
    expected = {n: t.clone() for n, t in converted_tensors(str(folder), torch.float32).items()}
    (file,) = cache.glob("*.safetensors")
    whole = file.read_bytes()
    file.unlink()  # as the mapping is still in use
    file.write_bytes(whole[: len(whole) // 2])
    (cache / f"{file.stem}.part").write_bytes(b"of one that was killed")
    found = converted_tensors(str(folder), torch.float32)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".safetensors"]


def test_several_at_once(checkpoint, cache, caplog):
    folder = checkpoint()
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(converted_tensors(str(folder), torch.float32)))
        for _ in range(4)
    ]
    with caplog.at_level("INFO"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    assert sum("converting" in record.getMessage() for record in caplog.records) == 1


def test_without_a_place_it_is_a_copy(checkpoint, tmp_path, monkeypatch, caplog):
    folder = checkpoint()
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("GNUQ_CACHE", str(tmp_path / "cache"))
    model = load_checkpoint(str(folder), dtype="float32", device="cpu", map_converted=True)
    assert own_bytes(model) == sum(p.nbytes for p in model.parameters())
    assert "a copy in its own memory" in caplog.text


def test_a_file_in_memory_would_save_nothing(checkpoint, tmp_path):
    folder = checkpoint()
    in_memory = next((m for m in ("/dev/shm", "/run") if converted._filesystem(Path(m)) == "tmpfs"), None)
    if in_memory is None:
        pytest.skip("no tmpfs here")
    with tempfile.TemporaryDirectory(dir=in_memory) as cache, pytest.raises(NotConvertedError, match="in memory"):
        converted_tensors(str(folder), torch.float32, cache=Path(cache))


def test_no_room(tmp_path):
    huge = {"w": torch.zeros(1).expand(2**50)}
    with pytest.raises(NotConvertedError, match="GiB free"):
        converted._make(tmp_path / "f.safetensors", huge, torch.float64)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_safetensors(tmp_path):
    tiny("llama", dtype=torch.float32).config.save_pretrained(tmp_path)
    with pytest.raises(NotConvertedError, match="no safetensors"):
        converted_tensors(str(tmp_path), torch.bfloat16)


def test_tensors_that_stay_in_float32_are_not_cast(tmp_path, cache, caplog):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "moe_num_experts": 4, "moe_k": 2}
    heads |= {"moe_intermediate_size": 16, "moe_num_shared_experts": 1}
    config = AutoConfig.for_model("ernie4_5_moe", **sizes, **heads, moe_layer_start_index=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    model = load_checkpoint(str(tmp_path / "model"), dtype="bfloat16", device="cpu", map_converted=True)
    assert_equal(model, load_checkpoint(str(tmp_path / "model"), dtype="bfloat16", device="cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    assert "some tensors of this model are not to be" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_file_is_what_safetensors_writes(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(safetensors_file, "_PIECE", 7)
    tensors = {"b": torch.randn(5, 3), "a": torch.randn(()), "none": torch.empty(0, 4), "c": torch.randn(20)}
    safetensors_file.write(tmp_path / "ours", tensors, dtype)
    expected = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    for found in (load_file(tmp_path / "ours"), safetensors_file.mapped([tmp_path / "ours"])):
        assert found.keys() == expected.keys()
        assert all(found[name].dtype == dtype for name in found)
        assert all(torch.equal(found[name], expected[name]) for name in found)
