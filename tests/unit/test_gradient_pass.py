"""The pass over whole (tiny) models, against plain autograd at batch 1."""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig, Qwen2Config
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaMLP

from gnuq_serve.gradnorm import UnsupportedModelError, cover, gradient_pass, register, registry
from gnuq_serve.gradnorm.oracle import Oracle

Samples = list[tuple[list[int], list[int]]]

PAD = 5
SAMPLES: dict[str, tuple[list[int], list[int]]] = {
    "one token each": ([7], [8]),
    "one-token prompt": ([7], [8, 7, 7, 11]),
    "one-token answer": ([3, 9, 27, 3, 3, 60], [9]),
    "pad token in the prompt": ([1, PAD, 12, PAD, 40, 12, 13], [14, 2]),
    "pad token in the answer": ([50, 51, 52], [PAD, 53, PAD, 2]),
    "long": ([*range(20, 50), *range(40, 20, -1)], [33, 34, 35, 90, 91]),
}
MODELS = (
    "llama",
    "llama, tied",
    "llama with biases",
    "llama with biases, tied",
    "gpt2",
    "gpt2, tied",
    "mistral",
    "mistral, tied",
    "qwen2",
    "qwen2, tied",
)


@pytest.fixture(scope="module")
def build(tiny_model, tiny_llama, tiny_gpt2, llama_sizes) -> Callable[[str, torch.dtype], Any]:
    def make(name: str, dtype: torch.dtype) -> Any:
        family, tied = name.removesuffix(", tied"), name.endswith(", tied")
        match family:
            case "llama":
                return tiny_llama(tied, dtype=dtype)
            case "llama with biases":
                return tiny_llama(tied, attention_bias=True, dtype=dtype)
            case "gpt2":
                return tiny_gpt2(tied, dtype=dtype)
            case "mistral":
                # A window shorter than the long sample.
                config = MistralConfig(**llama_sizes, sliding_window=8, tie_word_embeddings=tied)
            case "qwen2":
                config = Qwen2Config(**llama_sizes, tie_word_embeddings=tied)
        return tiny_model(config, dtype)

    return make


def norms(model: nn.Module, samples: Samples) -> list[float]:
    return gradient_pass(model, cover(model), samples).grad_norm_sq.tolist()


def one_by_one(model: nn.Module, samples: Samples) -> list[float]:
    return [norms(model, [sample])[0] for sample in samples]


def worst(actual: list[float], expected: list[float]) -> float:
    return max(abs(a / e - 1) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", MODELS)
class TestExactness:
    def test_float64(self, build, name):
        model = build(name, torch.float64)
        oracle = Oracle(model)
        samples = list(SAMPLES.values())
        expected = [oracle.score(*sample) for sample in samples]
        result = gradient_pass(model, cover(model), samples)
        assert result.grad_norm_sq.dtype == torch.float64
        assert worst(result.grad_norm_sq.tolist(), [norm for _, norm in expected]) <= 1e-9
        assert worst(one_by_one(model, samples), [norm for _, norm in expected]) <= 1e-9
        totals = [log_probabilities.sum().item() for log_probabilities in result.token_log_probabilities]
        assert worst(totals, [total for total, _ in expected]) <= 1e-9

    def test_float32(self, build, name):
        model = build(name, torch.float32)
        samples = list(SAMPLES.values())
        batch, single = norms(model, samples), one_by_one(model, samples)
        same, double = (
            [Oracle(model, dtype).score(*sample)[1] for sample in samples]
            for dtype in (torch.float32, torch.float64)
        )
        assert worst(batch, same) <= 5e-5
        assert worst(single, same) <= 5e-5
        assert worst(batch, double) <= 2e-4
        assert worst(single, double) <= 2e-4
        assert worst(batch, single) <= 2e-5
        assert worst(norms(model, samples[::-1])[::-1], batch) <= 2e-5


@pytest.mark.parametrize("name", ["llama with biases, tied", "gpt2"])
def test_bfloat16_is_near_float64(build, name):
    # The model's own arithmetic is coarse here; sums in bfloat16 on top would be far worse.
    model = build(name, torch.bfloat16)
    samples = list(SAMPLES.values())
    oracle = Oracle(model)
    assert worst(norms(model, samples), [oracle.score(*sample)[1] for sample in samples]) <= 0.1


def test_the_pad_token_counts(build):
    model = build("llama", torch.float64)
    assert model.get_input_embeddings().padding_idx == PAD
    sample = SAMPLES["pad token in the prompt"]
    dropping = Oracle(model)
    dropping.model.get_input_embeddings().padding_idx = PAD
    assert norms(model, [sample])[0] > dropping.score(*sample)[1] * (1 + 1e-4)


def test_log_probabilities_and_entropies_equal_a_naive_loop(build):
    model = build("gpt2, tied", torch.float64)
    samples = list(SAMPLES.values())
    result = gradient_pass(model, cover(model), samples)
    for b, (prompt, answer) in enumerate(samples):
        ids = list(prompt)
        log_probabilities, entropies = [], []
        for token in answer:
            with torch.no_grad():
                p = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1).tolist()
            log_probabilities.append(math.log(p[token]))
            entropies.append(-math.fsum(q * math.log(q) for q in p))
            ids.append(token)
        assert result.token_log_probabilities[b].tolist() == pytest.approx(log_probabilities, rel=1e-9)
        assert result.token_entropies[b].tolist() == pytest.approx(entropies, rel=1e-9)


class TestTheModelIsLeftAsItWas:
    @pytest.fixture
    def model(self, tiny_gpt2) -> Any:
        model = tiny_gpt2(tied=True, dtype=torch.float32)
        model.train()
        model.transformer.h[1].eval()
        model.transformer.wpe.weight.requires_grad_(False)
        return model

    def test_after_a_pass(self, model):
        with unchanged(model):
            norms(model, list(SAMPLES.values()))

    def test_after_an_error_in_the_forward_pass(self, model):
        with unchanged(model), pytest.raises(IndexError):
            norms(model, [([1, 1000], [2])])

    def test_after_an_error_in_a_rule(self, model, monkeypatch):
        def broken(layer: nn.Module, inputs: Any, delta: Tensor) -> Tensor:
            raise ArithmeticError("broken rule")

        monkeypatch.setattr(registry, "_rules", dict(registry._rules))
        register(nn.LayerNorm)(broken)
        with unchanged(model), pytest.raises(ArithmeticError, match="broken rule"):
            norms(model, list(SAMPLES.values()))

    def test_dropout_is_off(self, model):
        samples = list(SAMPLES.values())
        trained = norms(model, samples)
        assert trained == norms(model, samples)
        assert trained == norms(model.eval(), samples)

    def test_frozen_model_and_no_grad_caller(self, model):
        samples = list(SAMPLES.values())
        expected = norms(model, samples)
        model.requires_grad_(False)
        with torch.no_grad():
            assert norms(model, samples) == expected
            assert not torch.is_grad_enabled()

    def test_caller_in_inference_mode(self, model):
        expected = norms(model, [SAMPLES["long"]])
        with torch.inference_mode():
            assert norms(model, [SAMPLES["long"]]) == expected

    def test_gradients_of_the_users_own_training_are_kept(self, model):
        model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norms(model, list(SAMPLES.values()))
        after = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    @pytest.mark.parametrize("tied", [False, True])
    def test_nothing_of_the_graph_is_kept(self, tiny_llama, tied):
        model = tiny_llama(tied)
        coverage = cover(model)

        def score() -> None:
            gradient_pass(model, coverage, list(SAMPLES.values()))

        score()
        gc.collect()
        gc.disable()  # a cycle that waits for the collector would keep activations for a while
        try:
            before = tensors_alive()
            score()
            assert tensors_alive() == before
        finally:
            gc.enable()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    def state() -> Any:
        return (
            {name: (p.requires_grad, p.grad is None, p._version) for name, p in model.named_parameters()},
            {name: module.training for name, module in model.named_modules()},
        )

    def hooks() -> int:
        tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return sum(len(getattr(module, table)) for module in model.modules() for table in tables) + sum(
            len(parameter._backward_hooks or ()) for parameter in model.parameters()
        )

    before = state()
    assert hooks() == 0
    yield
    assert state() == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks() == 0


def tensors_alive() -> int:
    return sum(issubclass(type(item), Tensor) for item in gc.get_objects())


class Scale(nn.Module):
    """A layer type that no rule knows."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(size, dtype=torch.float64) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class ScaledMLP(LlamaMLP):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scale = Scale(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(super().forward(x))


class TestModelsThatAreRefused:
    @pytest.fixture
    def model(self, tiny_llama) -> Any:
        return tiny_llama()

    def test_unknown_layer(self, model):
        model.model.layers[1].mlp = ScaledMLP(model.config).double()
        with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.scale \(Scale: factor\)"):
            cover(model)

    def test_subclass_of_a_known_layer(self, model):
        class OtherLinear(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        model.model.layers[0].mlp.up_proj = OtherLinear(32, 56, bias=False).double()
        with pytest.raises(UnsupportedModelError, match=r"mlp\.up_proj \(OtherLinear: weight\)"):
            cover(model)

    def test_parameter_in_the_root(self, model):
        model.temperature = nn.Parameter(torch.ones(1))
        with pytest.raises(UnsupportedModelError, match=r"\(root\) \(LlamaForCausalLM: temperature\)"):
            cover(model)

    def test_extra_parameter_in_a_known_layer(self, model):
        model.model.layers[0].mlp.up_proj.gain = nn.Parameter(torch.ones(1))
        with pytest.raises(UnsupportedModelError, match=r"mlp\.up_proj \(Linear: gain\)"):
            cover(model)

    def test_many_unknown_layers_are_counted_not_listed(self, tiny_llama):
        model = tiny_llama(num_hidden_layers=5)
        for layer in model.model.layers:
            layer.mlp = ScaledMLP(model.config).double()
        with pytest.raises(UnsupportedModelError, match=r"and 2 more.*gnuq_serve\.gradnorm\.register"):
            cover(model)

    def test_tie_of_other_layers(self, model):
        mlp = model.model.layers[0].mlp
        mlp.up_proj.weight = mlp.gate_proj.weight
        with pytest.raises(UnsupportedModelError, match=r"mlp\.up_proj\.weight is shared with .*mlp\.gate_proj"):
            cover(model)

    def test_embedding_that_rewrites_itself(self, model):
        model.model.embed_tokens.max_norm = 1.0
        with pytest.raises(UnsupportedModelError, match="max_norm=None"):
            cover(model)

    def test_weight_used_without_its_layer(self, model):
        class Functional(LlamaMLP):
            def forward(self, x: Tensor) -> Tensor:
                gate = nn.functional.linear(x, self.gate_proj.weight)
                return self.down_proj(self.act_fn(gate) * self.up_proj(x))

        model.model.layers[0].mlp = Functional(model.config).double()
        with pytest.raises(RuntimeError, match=r"mlp\.gate_proj was never called"):
            norms(model, [([1, 2], [3])])

    def test_head_used_without_its_layer(self, model):
        class Headless(type(model)):
            def forward(self, input_ids: Tensor, **options: Any) -> Any:
                hidden = self.model(input_ids=input_ids).last_hidden_state
                return CausalLMOutput(logits=nn.functional.linear(hidden, self.lm_head.weight))

        model.__class__ = Headless
        with pytest.raises(RuntimeError, match="the head was never called"):
            norms(model, [([1, 2], [3])])

    def test_layer_called_by_keyword(self, model):
        class ByKeyword(LlamaMLP):
            def forward(self, x: Tensor) -> Tensor:
                return self.down_proj(self.up_proj(input=x))

        model.model.layers[0].mlp = ByKeyword(model.config).double()
        with pytest.raises(RuntimeError, match=r"mlp\.up_proj was called with keyword arguments only"):
            norms(model, [([1, 2], [3])])

    def test_no_head(self, model):
        with pytest.raises(UnsupportedModelError, match="LlamaModel has no output embeddings"):
            cover(model.model)

    def test_no_hugging_face_model(self):
        with pytest.raises(UnsupportedModelError, match="Linear has no output embeddings"):
            cover(nn.Linear(2, 2))

    def test_layer_that_runs_twice(self, model):
        model.model.layers[1] = model.model.layers[0]
        with (
            unchanged(model),
            pytest.raises(RuntimeError, match=r"model\.layers\.0\.\S+ ran twice in one forward pass"),
        ):
            norms(model, [([1, 2], [3])])

    def test_layer_without_a_batch_dimension(self, model):
        class Flattening(LlamaMLP):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.flatten(0, 1)).view_as(x)

        model.model.layers[0].mlp = Flattening(model.config).double()
        with pytest.raises(RuntimeError, match="ran without a batch dimension"):
            norms(model, [([1, 2], [3]), ([1, 2], [4])])

    def test_input_changed_in_place(self, model):
        class Overwriting(LlamaMLP):
            def forward(self, x: Tensor) -> Tensor:
                y = x.detach().clone()
                gate, up = self.gate_proj(y), self.up_proj(y)
                y.zero_()
                return self.down_proj(gate * up)

        model.model.layers[0].mlp = Overwriting(model.config).double()
        with pytest.raises(RuntimeError, match=r"mlp\.\S+ was changed in place"):
            norms(model, [([1, 2], [3])])


def test_registered_rule_for_a_custom_layer_is_exact(tiny_llama, monkeypatch):
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))

    @register(Scale, parameters=("factor",))
    def scale(layer: nn.Module, inputs: Any, delta: Tensor) -> Tensor:
        return (inputs.tensor * delta).flatten(1, -2).sum(1).square().sum(-1)

    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = ScaledMLP(model.config).double()
    samples = list(SAMPLES.values())
    oracle = Oracle(model)
    expected = [oracle.score(*sample)[1] for sample in samples]
    assert worst(norms(model, samples), expected) <= 1e-9
    counted = {name for name, _, rule in cover(model).rules if rule.name == "scale"}
    assert counted == {"model.layers.0.mlp.scale", "model.layers.1.mlp.scale"}
