"""Every architecture of the table: no layer goes the slow way, and the pass is exact. And what no table holds."""

import functools
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models.architectures import ARCHITECTURES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gnuq_serve.gradnorm import UnsupportedModelError, cover, gradient_pass, registry, token_grad_norms
from gnuq_serve.gradnorm.oracle import Oracle

DOCUMENT = Path(__file__).parents[2] / "docs/architectures.md"
SAMPLES = [([3, 4, 5, 5, 9, 12, 3], [7, 8, 9]), ([3, 4, 20], [3, 4, 20, 21, 22, 5]), ([11], [5])]
BOTH = [(name, tied) for name in ARCHITECTURES for tied in (False, True)]
# What must be in the table, by transformers' names.
SERVED = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "granite",
    "smollm3",
    "gpt2",
    "gpt_neox",
    "falcon",
    "mpt",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "olmoe",
    "qwen2_moe",
    "cohere",
    "stablelm",
    "starcoder2",
    "phi",
    "glm4",
    "ernie4_5",
    "exaone4",
}


def exact(model: Any) -> list[float]:
    oracle = Oracle(model)
    return [oracle.score(*sample)[1] for sample in SAMPLES]


@functools.cache
def built(name: str, tied: bool) -> tuple[Any, list[float]]:
    """A float64 model and what plain autograd says of it; left as they are by all tests."""
    model = ARCHITECTURES[name].build(tied)
    return model, exact(model)


def test_table_is_complete():
    missing = SERVED - {architecture.model_type for architecture in ARCHITECTURES.values()}
    assert not missing


def test_registered_names_exist():
    for key in registry._rules:
        module, _, name = key.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), name), nn.Module)


@pytest.mark.parametrize(("name", "tied"), BOTH)
class TestArchitecture:
    def test_every_parameter_is_counted_once_and_by_a_rule(self, name, tied):
        model, _ = built(name, tied)
        coverage = cover(model)
        assert coverage.slow == []
        assert coverage.tied == tied
        assert len(coverage.blocks) == 2
        counted = [
            parameter
            for module, rule in [(m, r) for _, m, r in coverage.rules] + [(coverage.head, coverage.head_rule)]
            for key, parameter in module.named_parameters(recurse=False)
            if key in rule.parameters and not (tied and parameter is coverage.head.weight)
        ]
        if tied:
            counted.append(coverage.head.weight)
        assert sorted(map(id, counted)) == sorted(map(id, model.parameters()))

    def test_one_by_one(self, name, tied):
        model, expected = built(name, tied)
        actual = [gradient_pass(model, cover(model), [sample]).grad_norm_sq.item() for sample in SAMPLES]
        assert actual == pytest.approx(expected, rel=ARCHITECTURES[name].tolerance)

    def test_batch_of_different_lengths(self, name, tied):
        model, expected = built(name, tied)
        actual = gradient_pass(model, cover(model), SAMPLES).grad_norm_sq.tolist()
        assert actual == pytest.approx(expected, rel=ARCHITECTURES[name].tolerance)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float32(name):
    expected = built(name, tied=True)[1]
    model = ARCHITECTURES[name].build(tied=True).float()
    actual = gradient_pass(model, cover(model), SAMPLES).grad_norm_sq.tolist()
    assert actual == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_token(name):
    model, _ = built(name, tied=True)
    expected = Oracle(model).token_grad_norms(*SAMPLES[0])
    actual = token_grad_norms(model, cover(model), SAMPLES[0]).tolist()
    assert actual == pytest.approx(expected, rel=ARCHITECTURES[name].tolerance)


def test_layer_read_from_ids():
    # Learned positions of a type of their own: the backward pass ends there, and must still reach it.
    settings = {
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
    }
    config = AutoConfig.for_model("opt", hidden_size=32, num_attention_heads=4, vocab_size=101, **settings)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    coverage = cover(model)
    assert coverage.slow == ["model.decoder.embed_positions"]
    actual = [gradient_pass(model, coverage, [sample]).grad_norm_sq.item() for sample in SAMPLES]
    assert actual == pytest.approx(exact(model), rel=1e-9)


def test_parameters_in_a_list_are_refused(tiny_llama):
    model = tiny_llama()
    model.model.extra = nn.ParameterList([nn.Parameter(torch.ones(3))])
    with pytest.raises(UnsupportedModelError, match=r"model\.extra: parameters in a ParameterList"):
        cover(model)


def test_documented_rule(tiny_llama, monkeypatch):
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "@register" in block]
    names: dict[str, Any] = {}
    exec(example, names)
    model = tiny_llama()
    model.model.norm = names["SoftClip"](model.config.hidden_size).double()
    nn.init.normal_(model.model.norm.limit)
    coverage = cover(model)
    assert coverage.slow == []
    assert "soft_clip" in {rule.name for _, _, rule in coverage.rules}
    assert gradient_pass(model, coverage, SAMPLES).grad_norm_sq.tolist() == pytest.approx(exact(model), rel=1e-9)
