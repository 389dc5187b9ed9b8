"""Each rule on a layer of its own, against plain autograd, one sample at a time."""

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from gnuq_serve.gradnorm import linear as linear_rules
from gnuq_serve.gradnorm import registry
from gnuq_serve.gradnorm.layer_call import LayerCall, SharedInput
from gnuq_serve.gradnorm.registry import rule_for
from gnuq_serve.gradnorm.tied import TiedHead

SAMPLES, D_IN, D_OUT = 3, 5, 7
SHORT, LONG = 2, 20  # tokens at which the linear rule takes the Gram form, and the tiled one


def perturbed(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer.double()


def registered(*rules: str) -> list[type[nn.Module]]:
    """The layer types of these rules; every name that is registered must exist."""
    names = [key.rpartition(".") for key, rule in registry._rules.items() if rule.name in rules]
    return [getattr(importlib.import_module(module), name) for module, _, name in names]


def by_rule(layer: nn.Module, tensor: Tensor, delta: Tensor) -> Tensor:
    rule = rule_for(layer)
    assert rule is not None
    assert {name for name, _ in layer.named_parameters()} <= rule.parameters
    return rule.function(layer, LayerCall.of(tensor), delta)


def by_autograd(layer: nn.Module, tensor: Tensor, delta: Tensor) -> Tensor:
    """The scalar ``<layer(x), delta>`` has the gradient ``delta`` at the layer's output."""
    layer = copy.deepcopy(layer)
    if isinstance(layer, nn.Embedding):
        layer.padding_idx = None
    norms = []
    for x, d in zip(tensor, delta, strict=True):
        scalar = (layer(x[None]) * d[None]).sum()
        gradients = torch.autograd.grad(scalar, list(layer.parameters()))
        norms.append(sum(g.square().sum() for g in gradients))
    return torch.stack(norms)


def assert_exact(layer: nn.Module, tensor: Tensor, d_out: int, rtol: float = 1e-10) -> None:
    delta = torch.randn(*tensor.shape[: 2 if tensor.dtype == torch.long else -1], d_out, dtype=torch.float64)
    actual = by_rule(layer, tensor, delta)
    assert actual.shape == (len(tensor),)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, by_autograd(layer, tensor, delta), rtol=rtol, atol=0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tiles of three output columns in float64; the list gets an entry for each call of the tiled form."""
    calls: list[int] = []
    tiled = linear_rules._tiled_norm_sq

    def counted(rows: Tensor, delta_rows: Tensor) -> Tensor:
        calls.append(delta_rows.shape[-1])
        return tiled(rows, delta_rows)

    monkeypatch.setattr(linear_rules, "_tiled_norm_sq", counted)
    monkeypatch.setattr(linear_rules, "TILE_BYTES", 3 * 8 * D_IN)
    return calls


LINEAR_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear with bias": lambda: nn.Linear(D_IN, D_OUT),
    "linear": lambda: nn.Linear(D_IN, D_OUT, bias=False),
    "Conv1D": lambda: Conv1D(D_OUT, D_IN),
    "FalconLinear": lambda: FalconLinear(D_IN, D_OUT),
}


@pytest.mark.parametrize("make", LINEAR_LAYERS.values(), ids=LINEAR_LAYERS.keys())
class TestLinear:
    def test_gram_form(self, make, tiles):
        assert_exact(perturbed(make()), torch.randn(SAMPLES, SHORT, D_IN, dtype=torch.float64), D_OUT)
        assert not tiles

    def test_tiled_form(self, make, tiles):
        assert_exact(perturbed(make()), torch.randn(SAMPLES, LONG, D_IN, dtype=torch.float64), D_OUT)
        assert tiles == [D_OUT]

    def test_single_token(self, make, tiles):
        assert_exact(perturbed(make()), torch.randn(SAMPLES, 1, D_IN, dtype=torch.float64), D_OUT)

    def test_tile_smaller_than_one_column(self, make, tiles, monkeypatch):
        monkeypatch.setattr(linear_rules, "TILE_BYTES", 1)
        assert_exact(perturbed(make()), torch.randn(SAMPLES, LONG, D_IN, dtype=torch.float64), D_OUT)
        assert tiles

    @pytest.mark.parametrize("inner", [(2, 1), (4, 6)])
    def test_more_dimensions_than_one_for_tokens(self, make, tiles, inner):
        assert_exact(perturbed(make()), torch.randn(SAMPLES, *inner, D_IN, dtype=torch.float64), D_OUT)
        assert bool(tiles) == (inner == (4, 6))


def test_readers_of_one_input_share_its_gram():
    layers = [perturbed(nn.Linear(D_IN, D_OUT)) for _ in range(2)]
    tensor = torch.randn(SAMPLES, SHORT, D_IN, dtype=torch.float64)
    shared = SharedInput(tensor)
    calls = [LayerCall(shared) for _ in layers]
    grams = []
    for layer, call in zip(layers, calls, strict=True):
        delta = torch.randn(SAMPLES, SHORT, D_OUT, dtype=torch.float64)
        actual = rule_for(layer).function(layer, call, delta)
        torch.testing.assert_close(actual, by_autograd(layer, tensor, delta), rtol=1e-10, atol=0)
        assert call.readers == 2
        grams.append(call.gram())
    assert grams[0] is grams[1]


def test_input_changed_in_place_is_noticed():
    tensor = torch.randn(SAMPLES, SHORT, D_IN)
    call = LayerCall.of(tensor)
    call.check_unchanged("layer")
    tensor.add_(1)
    with pytest.raises(RuntimeError, match=r"the input of model\.layer was changed in place"):
        call.check_unchanged("model.layer")


def test_rows_of_all_samples_in_one():
    # As layers inside a mixture of experts are called: (B * T, d).
    layer = perturbed(nn.Linear(D_IN, D_OUT))
    tensor = torch.randn(SAMPLES, SHORT, D_IN, dtype=torch.float64)
    delta = torch.randn(SAMPLES, SHORT, D_OUT, dtype=torch.float64)
    call = LayerCall(SharedInput(tensor.flatten(0, 1)), (SAMPLES, SHORT))
    actual = rule_for(layer).function(layer, call, call.by_sample(delta.flatten(0, 1)))
    torch.testing.assert_close(actual, by_autograd(layer, tensor, delta), rtol=1e-10, atol=0)


# Gemma's and Cohere's norms go through float32 whatever the dtype, and there autograd sums the weight's gradient.
IN_FLOAT32 = ("Gemma", "Cohere")


@pytest.mark.parametrize("layer_type", registered("scaled_norm", "one_plus_norm"))
class TestNorms:
    @pytest.mark.parametrize("inner", [(1,), (6,), (4, 3)])
    def test_exact(self, layer_type, inner):
        # (4, 3): tokens and attention heads, as query and key norms see them.
        rtol = 1e-6 if layer_type.__name__.startswith(IN_FLOAT32) else 1e-10
        tensor = torch.randn(SAMPLES, *inner, D_IN, dtype=torch.float64)
        assert_exact(perturbed(layer_type(D_IN)), tensor, D_IN, rtol)

    def test_weights_are_left_alone(self, layer_type):
        layer = perturbed(layer_type(D_IN))
        before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
        by_rule(layer, *torch.randn(2, SAMPLES, 6, D_IN, dtype=torch.float64))
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, before[name])
            assert parameter.grad is None


class TestEmbedding:
    IDS = torch.tensor([[3, 1, 3, 3, 0], [1, 1, 1, 1, 1], [0, 9, 2, 4, 9]])

    @pytest.mark.parametrize("padding_idx", [None, 1])
    def test_repeated_tokens_within_and_across_samples(self, padding_idx):
        assert_exact(perturbed(nn.Embedding(10, D_IN, padding_idx=padding_idx)), self.IDS, D_IN)

    def test_row_of_padding_idx_counts(self):
        # The second sample reads nothing else.
        layer = perturbed(nn.Embedding(10, D_IN, padding_idx=1))
        delta = torch.randn(3, 5, D_IN, dtype=torch.float64)
        assert by_rule(layer, self.IDS, delta)[1] > 0


@pytest.mark.parametrize("layer_type", [t for t in registered("embedding") if t is not nn.Embedding])
class TestScaledEmbedding:
    def test_exact(self, layer_type):
        layer = perturbed(layer_type(10, D_IN, 1, embed_scale=3.25))
        assert float(layer.embed_scale) == 3.25
        assert_exact(layer, TestEmbedding.IDS, D_IN)

    def test_scale_is_rounded_as_the_layer_rounds_it(self, layer_type):
        # 25.298 is 25.25 in bfloat16: 0.4 % of the squared norm.
        layer = layer_type(10, D_IN, None, embed_scale=640**0.5).bfloat16()
        layer.embed_scale.data = torch.tensor(640**0.5)
        nn.init.ones_(layer.weight)
        factor = layer(torch.tensor([3])).unique().item()
        assert factor == 25.25
        delta = torch.randn(1, 1, D_IN, dtype=torch.bfloat16)
        expected = (delta.double() * factor).square().sum()
        actual = by_rule(layer, torch.tensor([[3]]), delta)[0]
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)


def test_layer_norm_without_bias():
    layer = perturbed(nn.LayerNorm(D_IN, bias=False))
    assert_exact(layer, torch.randn(SAMPLES, 6, D_IN, dtype=torch.float64), D_IN)


def test_norm_with_a_weight_for_each_head():
    layer = perturbed(CohereLayerNorm((4, D_IN)))
    tensor = torch.randn(SAMPLES, 6, 4, D_IN, dtype=torch.float64)
    assert_exact(layer, tensor, D_IN, rtol=1e-6)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norm_over_two_dimensions(norm):
    layer = perturbed(norm((4, D_IN)))
    tensor, delta = torch.randn(2, SAMPLES, 6, 4, D_IN, dtype=torch.float64)
    torch.testing.assert_close(
        by_rule(layer, tensor, delta), by_autograd(layer, tensor, delta), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("padding_idx", [None, 1])
def test_tied_head_and_embedding(padding_idx):
    embedding = perturbed(nn.Embedding(10, D_IN, padding_idx=padding_idx))
    head = nn.Linear(D_IN, 10, bias=False).double()
    head.weight = embedding.weight
    ids = torch.tensor([3, 1, 3, 3, 0, 1])
    hidden = torch.randn(4, D_IN, dtype=torch.float64)
    delta_embedding = torch.randn(6, D_IN, dtype=torch.float64)
    delta_head = torch.randn(4, 10, dtype=torch.float64)

    weight = embedding.weight.detach().clone().requires_grad_(True)
    scalar = (weight[ids] * delta_embedding).sum() + (hidden @ weight.T * delta_head).sum()
    (gradient,) = torch.autograd.grad(scalar, weight)

    cross = TiedHead.of(hidden, delta_head, ids).cross_term(delta_embedding)
    parts = by_rule(embedding, ids[None], delta_embedding[None]) + by_rule(head, hidden[None], delta_head[None])
    assert cross.abs() > 0.01 * parts.sum()
    torch.testing.assert_close((parts + cross)[0], gradient.square().sum(), rtol=1e-10, atol=0)


BFLOAT16_LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "linear, Gram form": (lambda: nn.Linear(64, 64), 24),
    "linear, tiled form": (lambda: nn.Linear(64, 64), 200),
    "LayerNorm": (lambda: nn.LayerNorm(64), 200),
    "RMSNorm": (lambda: nn.RMSNorm(64), 200),
    "LlamaRMSNorm": (lambda: LlamaRMSNorm(64), 200),
    "GemmaRMSNorm": (lambda: GemmaRMSNorm(64), 200),
}


@pytest.mark.parametrize(("make", "tokens"), BFLOAT16_LAYERS.values(), ids=BFLOAT16_LAYERS.keys())
def test_bfloat16_accumulates_in_float32(make, tokens):
    layer = perturbed(make()).bfloat16()
    tensor, delta = torch.randn(2, SAMPLES, tokens, 64, dtype=torch.bfloat16)
    actual = by_rule(layer, tensor, delta)
    assert actual.dtype == torch.float32
    # The layer's own factor of the weight gradient, in its own bfloat16 arithmetic; the sums in float64.
    if isinstance(layer, nn.Linear):
        weight = delta.double().mT @ tensor.double()
    else:
        neutral = copy.deepcopy(layer)
        nn.init.constant_(neutral.weight, 0 if isinstance(layer, GemmaRMSNorm) else 1)
        if getattr(neutral, "bias", None) is not None:
            nn.init.zeros_(neutral.bias)
        weight = (neutral(tensor).double() * delta.double()).sum(1)
    expected = weight.square().flatten(1).sum(1)
    if getattr(layer, "bias", None) is not None:
        expected += delta.double().sum(1).square().sum(-1)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=0)


def test_bfloat16_embedding_and_tie_accumulate_in_float32():
    ids = torch.randint(5, (1, 400))
    delta, hidden = torch.randn(1, 400, 64, dtype=torch.bfloat16), torch.randn(9, 64, dtype=torch.bfloat16)
    delta_head = torch.randn(9, 5, dtype=torch.bfloat16)
    actual = by_rule(nn.Embedding(5, 64, dtype=torch.bfloat16), ids, delta)
    cross = TiedHead.of(hidden, delta_head, ids[0]).cross_term(delta[0].float())
    assert actual.dtype == cross.dtype == torch.float32

    rows = torch.zeros(5, 64, dtype=torch.float64).index_add_(0, ids[0], delta[0].double())
    torch.testing.assert_close(actual[0].double(), rows.square().sum(), rtol=2e-5, atol=0)
    expected = 2 * (rows * (delta_head.double().T @ hidden.double())).sum()
    torch.testing.assert_close(cross.double(), expected, rtol=2e-4, atol=0)
