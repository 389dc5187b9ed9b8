"""How much memory scoring needs, and how much of a GPU the engine is left with."""

import pytest
import torch
from tiny_families import FAMILIES, SIZES, tiny

from gnuq_serve.gradnorm import cover
from gnuq_serve.gradnorm.memory import measure
from gnuq_serve.scorer import Scorer
from gnuq_serve.weights.estimate import estimate
from gnuq_serve.weights.room import own_bytes, weight_bytes

GIB = 2**30


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_is_what_the_model_itself_measures(family, dtype, tmp_path):
    model = tiny(family, dtype=getattr(torch, dtype))
    model.config.save_pretrained(tmp_path)  # no weights there
    found = estimate(str(tmp_path), dtype, 60)
    assert found.weights == weight_bytes(model) == sum(p.nbytes for p in model.parameters())
    model.requires_grad_(False)
    expected = measure(model, cover(model)).bytes(60, 1, 60)
    # Layers with and without a window differ a little, and so does what experts keep, by where tokens go.
    unlike = family in ("gemma3_text", "gpt_oss", "mixtral")
    assert found.pass_bytes == pytest.approx(expected, rel=0.1 if unlike else 0.02)


def test_tied_weights_count_once(tmp_path):
    tiny("llama", tied=True).config.save_pretrained(tmp_path)
    tied = estimate(str(tmp_path), "float32", 8).weights
    tiny("llama").config.save_pretrained(tmp_path)
    assert estimate(str(tmp_path), "float32", 8).weights - tied == 4 * SIZES["vocab_size"] * SIZES["hidden_size"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_would_merge_is_known_beforehand(family, tmp_path):
    tiny(family).config.save_pretrained(tmp_path)
    found = estimate(str(tmp_path), "float32", 8).unshareable
    assert (found is None) == (family != "mixtral")
    assert found is None or "experts" in found


def test_own_memory(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    assert own_bytes(model) == weight_bytes(model)


def test_a_pass_is_never_over_the_budget():
    model = tiny("llama", dtype=torch.float32)
    free = Scorer.from_model(model, memory_budget="1GiB")
    small, large = free.pass_bytes(50), free.pass_bytes(5000)
    assert 0 < 50 * small < large < GIB
    assert Scorer.from_model(model, memory_budget=small).pass_bytes(5000) == small
