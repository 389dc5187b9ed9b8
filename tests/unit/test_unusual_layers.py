"""Layers that no rule knows, layers used in unusual ways, and models that are refused."""

from typing import Any

import pytest
import torch
from left_clean import tensors_kept_by, unchanged
from tiny_families import SAMPLES, tiny, worst
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from gnuq_serve.gradnorm import UnsupportedModelError, cover, gradient_pass, register, registry
from gnuq_serve.gradnorm.oracle import Oracle
from gnuq_serve.gradnorm.prefix import PrefixCache
from gnuq_serve.gradnorm.trace import token_grad_norms


@pytest.fixture
def model() -> Any:
    return tiny("llama", tied=True)


def with_mlp(model: Any, mlp: type[nn.Module]) -> Any:
    for layer in model.model.layers:
        layer.mlp = mlp(model.config).double()
    return model


def assert_exact(model: Any, one_by_one: bool = True) -> None:
    oracle = Oracle(model)
    coverage = cover(model)
    batches = [[sample] for sample in SAMPLES] if one_by_one else [SAMPLES]
    norms = [norm_sq for batch in batches for norm_sq in gradient_pass(model, coverage, batch).grad_norm_sq]
    assert worst(norms, [oracle.score(*sample)[1] for sample in SAMPLES]) <= 1e-9


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


class TestSlowPath:
    def test_unknown_layer(self, model):
        with_mlp(model, ScaledMLP)
        assert cover(model).slow == [f"model.layers.{i}.mlp.scale" for i in range(3)]
        assert_exact(model)

    def test_subclass_of_a_known_layer(self, model):
        class OtherLinear(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        model.model.layers[0].mlp.up_proj = OtherLinear(32, 56).double()
        assert cover(model).slow == ["model.layers.0.mlp.up_proj"]
        assert_exact(model)

    def test_extra_parameter_of_a_known_layer(self, model):
        model.model.layers[0].mlp.up_proj.gain = nn.Parameter(torch.ones(1))
        assert cover(model).slow == ["model.layers.0.mlp.up_proj"]
        assert_exact(model)

    def test_parameter_that_the_layer_does_not_use(self, model):
        class Idle(Scale):
            def forward(self, x: Tensor) -> Tensor:
                return x * 3

        model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), Idle(56))
        assert_exact(model)

    def test_several_outputs(self, model):
        class Split(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.factors = nn.Parameter(torch.rand(3, 32, dtype=torch.float64))

            def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
                first = self.factors[0] * x
                return first, None, first * self.factors[1], x.detach() + self.factors[2]

        class SplitMLP(LlamaMLP):
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.split = Split()

            def forward(self, x: Tensor) -> Tensor:
                first, _, second, _ = self.split(x)
                return super().forward(first + second * first)

        assert_exact(with_mlp(model, SplitMLP))

    @pytest.mark.parametrize("recompute", [0, 3])
    def test_parameter_of_a_block(self, model, recompute):
        class Block(LlamaDecoderLayer):
            def __init__(self, config: Any, layer_idx: int) -> None:
                super().__init__(config, layer_idx)
                self.gain = nn.Parameter(torch.tensor(1.5))

            def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
                return self.gain * super().forward(hidden_states, **kwargs)

        model.model.layers[1] = Block(model.config, 1).double().eval()
        coverage = cover(model)
        assert coverage.slow == ["model.layers.1"]
        oracle = Oracle(model)
        for sample in SAMPLES:
            result = gradient_pass(model, coverage, [sample], semantic=True, recompute=recompute)
            assert worst(result.grad_norm_sq, [oracle.score(*sample)[1]]) <= 1e-9
            assert worst(result.hidden_grad, [oracle.hidden_gradients(*sample)[1]]) <= 1e-9
            assert worst(result.semantic.semgrad, [oracle.semantic(*sample).semgrad]) <= 1e-9

    def test_all_kinds_of_pass(self, model):
        coverage = cover(with_mlp(model, ScaledMLP))
        oracle = Oracle(model)
        sample = (prompt, _) = SAMPLES[0]
        with unchanged(model):
            again = gradient_pass(model, coverage, [sample], recompute=3).grad_norm_sq
            prefixes = [PrefixCache(model, 2**20).keys_and_values(prompt[:-1])]
            constant = gradient_pass(model, coverage, [sample], prefixes=prefixes, recompute=1).grad_norm_sq
            trace = token_grad_norms(model, coverage, sample, group=4, recompute=1)
        assert worst(again, [oracle.score(*sample)[1]]) <= 1e-9
        assert worst(constant, [oracle.answer_only(*sample)[1]]) <= 1e-9
        assert worst(trace, oracle.token_grad_norms(*sample)) <= 1e-9

    def test_nothing_of_the_graph_is_kept(self, model):
        coverage = cover(with_mlp(model, ScaledMLP))
        assert tensors_kept_by(lambda: gradient_pass(model, coverage, SAMPLES[:1], semantic=True)) == 0

    def test_one_sample_at_a_time(self, model):
        coverage = cover(with_mlp(model, ScaledMLP))
        with unchanged(model), pytest.raises(RuntimeError, match=r"mlp\.scale goes the slow way .* one sample"):
            gradient_pass(model, coverage, SAMPLES[:2])

    def test_outputs_that_cannot_be_read(self, model):
        class Named(Scale):
            def forward(self, x: Tensor) -> dict[str, Tensor]:
                return {"x": self.factor * x}

        class NamedMLP(ScaledMLP):
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.scale = Named(config.hidden_size)

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x)["x"]

        coverage = cover(with_mlp(model, NamedMLP))
        with (
            unchanged(model),
            pytest.raises(RuntimeError, match=r"mlp\.scale returns a dict: the slow way"),
        ):
            gradient_pass(model, coverage, SAMPLES[:1])


def test_registered_rule_for_a_custom_layer(model, monkeypatch):
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))

    @register(Scale, parameters=("factor",))
    def scale(layer: nn.Module, call: Any, delta: Tensor) -> Tensor:
        return (call.tensor * delta).flatten(1, -2).sum(1).square().sum(-1)

    with_mlp(model, ScaledMLP)
    assert cover(model).slow == []
    assert_exact(model, one_by_one=False)


class TestUnusualUse:
    def test_input_by_keyword(self, model):
        class ByKeyword(LlamaMLP):
            def forward(self, x: Tensor) -> Tensor:
                return self.down_proj(self.act_fn(self.gate_proj(input=x)) * self.up_proj(input=x))

        assert_exact(with_mlp(model, ByKeyword), one_by_one=False)

    def test_rows_of_all_samples_in_one(self, model):
        class Flattening(LlamaMLP):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.flatten(0, 1)).view_as(x)

        assert_exact(with_mlp(model, Flattening), one_by_one=False)

    def test_samples_that_cannot_be_told_apart(self, model):
        class Halved(LlamaMLP):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.unflatten(-2, (2, -1)).flatten(0, 1)).view_as(x)

        coverage = cover(with_mlp(model, Halved))
        with unchanged(model), pytest.raises(RuntimeError, match="ran without a batch dimension"):
            gradient_pass(model, coverage, [([1, 2, 3], [4, 5]), ([1, 2, 3], [6, 7])])

    def test_layer_that_runs_twice(self, model):
        model.model.layers[1] = model.model.layers[0]
        with (
            unchanged(model),
            pytest.raises(RuntimeError, match=r"model\.layers\.0\.\S+ ran twice in one"),
        ):
            gradient_pass(model, cover(model), SAMPLES[:1])

    @pytest.mark.parametrize("recompute", [0, 3])
    def test_input_changed_in_place(self, model, recompute):
        class Overwriting(LlamaMLP):
            def forward(self, x: Tensor) -> Tensor:
                y = x.clone()
                gate, up = self.gate_proj(y), self.up_proj(y)
                with torch.no_grad():
                    y.zero_()
                return self.down_proj(gate * up)

        coverage = cover(with_mlp(model, Overwriting))
        with unchanged(model), pytest.raises(RuntimeError, match=r"mlp\.\S+ was changed in place"):
            gradient_pass(model, coverage, SAMPLES[:1], recompute=recompute)

    def test_layers_that_read_nothing_of_their_blocks_input(self, model):
        class Detached(LlamaMLP):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(torch.ones_like(x))

        assert_exact(with_mlp(model, Detached), one_by_one=False)
        with unchanged(model), pytest.raises(RuntimeError, match=r"mlp\.\S+ reads nothing of its block's input"):
            gradient_pass(model, cover(model), SAMPLES, recompute=3)

    def test_weight_used_without_its_layer(self, model):
        class Functional(LlamaMLP):
            def forward(self, x: Tensor) -> Tensor:
                gate = nn.functional.linear(x, self.gate_proj.weight)
                return self.down_proj(self.act_fn(gate) * self.up_proj(x))

        coverage = cover(with_mlp(model, Functional))
        with unchanged(model), pytest.raises(RuntimeError, match=r"mlp\.gate_proj was never called"):
            gradient_pass(model, coverage, SAMPLES[:1])

    def test_head_used_without_its_layer(self, model):
        class Headless(type(model)):
            def forward(self, input_ids: Tensor, **options: Any) -> Any:
                hidden = self.model(input_ids=input_ids).last_hidden_state
                return CausalLMOutput(logits=nn.functional.linear(hidden, self.lm_head.weight))

        model.__class__ = Headless
        with unchanged(model), pytest.raises(RuntimeError, match="the head was never called"):
            gradient_pass(model, cover(model), SAMPLES[:1])


class TestModelsThatAreRefused:
    def test_parameter_in_the_root(self, model):
        model.temperature = nn.Parameter(torch.ones(1))
        with pytest.raises(UnsupportedModelError, match=r"\(LlamaForCausalLM: temperature\)"):
            cover(model)

    def test_parameter_in_the_body(self, model):
        model.model.gain = nn.Parameter(torch.ones(1))
        with pytest.raises(UnsupportedModelError, match=r"model \(LlamaModel: gain\)"):
            cover(model)

    def test_other_kind_of_head(self, model):
        class OtherLinear(nn.Linear):
            pass

        model.lm_head = OtherLinear(32, 101, bias=False).double()
        with pytest.raises(UnsupportedModelError, match=r"lm_head \(OtherLinear: weight\).*gradnorm\.register"):
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

    def test_no_head(self, model):
        with pytest.raises(UnsupportedModelError, match="LlamaModel has no output embeddings"):
            cover(model.model)

    def test_no_hugging_face_model(self):
        with pytest.raises(UnsupportedModelError, match="Linear has no output embeddings"):
            cover(nn.Linear(2, 2))


def test_a_slow_embeddings_padding_row_counts(tiny_gpt2):
    """Autograd would drop the gradient of `padding_idx` where the layer is run again too."""

    class OtherEmbedding(nn.Embedding):
        """A type that no rule knows."""

    model = tiny_gpt2()
    positions = OtherEmbedding(64, 32, padding_idx=2).double()
    with torch.no_grad():
        positions.weight.copy_(model.transformer.wpe.weight)
    model.transformer.wpe = positions
    coverage = cover(model)
    assert coverage.slow == ["transformer.wpe"]
    for sample in (([3, 4, 5, 5, 9], [7, 8, 9]), ([11], [5])):
        (found,) = gradient_pass(model, coverage, [sample]).grad_norm_sq.tolist()
        assert found == pytest.approx(Oracle(model).score(*sample)[1], rel=1e-9)
    assert positions.padding_idx == 2
