"""Models with PEFT adapters: those in use count, those not in use are left out by name, the rest is refused."""

from typing import Any

import pytest
import torch

from gnuq_serve.gradnorm import UnsupportedModelError, cover, gradient_pass, token_grad_norms
from gnuq_serve.gradnorm.oracle import Oracle

peft = pytest.importorskip("peft")

SAMPLES = [([3, 4, 5, 5, 9], [7, 8, 9]), ([3, 4, 20], [3, 4, 20, 21, 22, 5]), ([11], [5])]
LAYERS, LINEARS = 2, 7


def perturbed(model: Any) -> Any:
    """A fresh adapter's B is zero, and so would be the gradient of its A."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.double().eval()


def adapted(model: Any, **settings: Any) -> Any:
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1, **settings})
    return perturbed(peft.get_peft_model(model, config))


def norms(model: Any) -> list[float]:
    return gradient_pass(model, cover(model), SAMPLES).grad_norm_sq.tolist()


def assert_exact(model: Any) -> None:
    oracle = Oracle(model)
    assert cover(model).slow == []
    assert norms(model) == pytest.approx([oracle.score(*sample)[1] for sample in SAMPLES], rel=1e-9)


@pytest.fixture
def two(tiny_llama):
    """``default`` on all seven linear layers of both blocks, ``other`` on two of them; ``default`` is in use."""
    model = adapted(tiny_llama())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    return perturbed(model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "up_proj"], "lora_bias": True},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_exact(tiny_llama, settings, tied):
    assert_exact(adapted(tiny_llama(tied=tied, attention_bias=True), **settings))


def test_base_weights_and_adapter_both_count(tiny_llama):
    model = adapted(tiny_llama())
    counted = {f"{name}.{parameter}" for name, _, rule in cover(model).rules for parameter in rule.parameters}
    for part in ("base_layer", "lora_A.default", "lora_B.default"):
        assert f"base_model.model.model.layers.0.self_attn.q_proj.{part}.weight" in counted


def test_added_by_transformers(tiny_llama):
    model = tiny_llama()
    model.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear"))
    assert_exact(perturbed(model))


def test_trace(two):
    expected = Oracle(two).token_grad_norms(*SAMPLES[1])
    assert token_grad_norms(two, cover(two), SAMPLES[1]).tolist() == pytest.approx(expected, rel=1e-9)


class TestSeveralAdapters:
    def test_one_in_use(self, two):
        before = norms(two)
        assert_exact(two)
        assert [name for name, _ in cover(two).inactive] == [
            f"base_model.model.model.layers.{layer}.{module}.lora_{part}.other"
            for layer in range(LAYERS)
            for module in ("self_attn.q_proj", "mlp.down_proj")
            for part in "AB"
        ]
        two.set_adapter("other")
        assert_exact(two)
        assert len(cover(two).inactive) == LAYERS * LINEARS * 2
        assert norms(two) != pytest.approx(before, rel=1e-3)

    def test_both_in_use(self, two):
        two.base_model.set_adapter(["default", "other"])
        assert_exact(two)
        assert cover(two).inactive == ()

    def test_none_in_use(self, two, tiny_llama):
        with two.disable_adapter():
            assert_exact(two)
            assert norms(two) == pytest.approx(norms(tiny_llama()), rel=1e-12)
            assert len(cover(two).inactive) == LAYERS * (LINEARS + 2) * 2

    def test_merged(self, two):
        two.merge_adapter()
        assert_exact(two)
        two.unmerge_adapter()
        assert_exact(two)

    def test_merged_and_unloaded(self, two):
        plain = two.merge_and_unload()
        assert_exact(plain)
        assert cover(plain).inactive == ()

    def test_switching_without_covering_again_is_noticed(self, two):
        coverage = cover(two)
        two.base_model.set_adapter(["default", "other"])
        with pytest.raises(RuntimeError, match=r"lora_A\.other was not in use when the model was covered"):
            gradient_pass(two, coverage, SAMPLES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, r"lm_head: an adapter on the head .*merge_and_unload"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, r"lm_head: an adapter on the head"),
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens: an adapter on the embedding .*merge_and_unload"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "an adapter on the embedding"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "an adapter on the embedding"),
        ({"target_modules": ["q_proj"], "use_dora": True}, r"q_proj: only plain LoRA .*DoRA"),
        ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "adapters of single parameters"),
    ],
    ids=str,
)
def test_refused(tiny_llama, settings, message):
    with pytest.raises(UnsupportedModelError, match=message):
        cover(adapted(tiny_llama(), **{"lora_dropout": 0.0, **settings}))


def test_other_kinds_are_refused(tiny_llama):
    scaling = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(UnsupportedModelError, match=r"k_proj\.ia3_l: parameters in a ParameterDict"):
        cover(peft.get_peft_model(tiny_llama(), scaling))
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UnsupportedModelError, match="learned prompts"):
        cover(peft.get_peft_model(tiny_llama(), prompt))


def test_a_model_with_learned_positions_inside_the_wrapper(tiny_gpt2):
    assert_exact(adapted(tiny_gpt2(), fan_in_fan_out=True))
