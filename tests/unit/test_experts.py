"""Fused experts: the rule on layers of their own, and whole models under every implementation of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models.architectures import ARCHITECTURES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from gnuq_serve.gradnorm import cover, gradient_pass
from gnuq_serve.gradnorm import linear as linear_rules
from gnuq_serve.gradnorm.layer_call import LayerCall, SharedInput
from gnuq_serve.gradnorm.oracle import Oracle
from gnuq_serve.gradnorm.registry import rule_for

LAYERS = [GptOssExperts, MixtralExperts, OlmoeExperts, Qwen2MoeExperts, Qwen3MoeExperts]
SAMPLES, TOKENS, EXPERTS, TOP = 3, 5, 4, 2
WIDTH, INNER = 6, 7
MIXTURES = [name for name, a in ARCHITECTURES.items() if "experts_implementation" in a.settings]


def build(layer_type: type[nn.Module], width: int = WIDTH, inner: int = INNER, dtype: Any = torch.float64) -> Any:
    torch.manual_seed(0)
    config = SimpleNamespace(
        num_local_experts=EXPERTS,
        num_experts=EXPERTS,
        hidden_size=width,
        intermediate_size=inner,
        moe_intermediate_size=inner,
        hidden_act="silu",
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        _experts_implementation="eager",
    )
    layer = layer_type(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.to(dtype)


def routing(tokens: int, *, one_expert: bool = False) -> tuple[Tensor, Tensor]:
    """Expert 3 is never chosen, so that one is idle; or all tokens go to experts 1 and 0."""
    index = torch.stack([torch.randperm(EXPERTS - 1)[:TOP] for _ in range(SAMPLES * tokens)])
    if one_expert:
        index = torch.tensor([1, 0]).expand(SAMPLES * tokens, TOP)
    return index, torch.rand(SAMPLES * tokens, TOP, dtype=torch.float64)


def by_rule(layer: Any, hidden: Tensor, index: Tensor, weights: Tensor, delta: Tensor) -> Tensor:
    samples, tokens = delta.shape[:2]
    call = LayerCall(SharedInput(hidden), (samples, tokens), (hidden, index, weights))
    rule = rule_for(layer)
    assert {name for name, _ in layer.named_parameters()} <= rule.parameters
    return rule.function(layer, call, delta)


def by_autograd(layer: Any, hidden: Tensor, index: Tensor, weights: Tensor, delta: Tensor) -> Tensor:
    """The scalar ``<layer(x), delta>`` of one sample alone has the gradient ``delta`` at the layer's output."""
    rows = zip(*(t.chunk(len(delta)) for t in (hidden, index, weights)), delta, strict=True)
    norms = []
    for h, i, w, d in rows:
        gradients = torch.autograd.grad((layer(h, i, w) * d).sum(), list(layer.parameters()), allow_unused=True)
        norms.append(sum(g.square().sum() for g in gradients if g is not None))
    return torch.stack(norms)


@pytest.mark.parametrize("layer_type", LAYERS)
@pytest.mark.parametrize("one_expert", [False, True])
@pytest.mark.parametrize(("tokens", "tile"), [(1, None), (TOKENS, None), (40, 3 * 8 * WIDTH)])
def test_exact(layer_type, one_expert, tokens, tile, monkeypatch):
    # 40 tokens take the tiled form of the linear rule, in tiles of three columns.
    if tile is not None:
        monkeypatch.setattr(linear_rules, "TILE_BYTES", tile)
    layer = build(layer_type)
    hidden = torch.randn(SAMPLES * tokens, WIDTH, dtype=torch.float64)
    call = (hidden, *routing(tokens, one_expert=one_expert))
    delta = torch.randn(SAMPLES, tokens, WIDTH, dtype=torch.float64)
    actual = by_rule(layer, *call, delta)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, by_autograd(layer, *call, delta), rtol=1e-11, atol=0)


@pytest.mark.parametrize("layer_type", LAYERS)
def test_for_many_gradients_at_once(layer_type):
    layer = build(layer_type)
    call = (torch.randn(SAMPLES * TOKENS, WIDTH, dtype=torch.float64), *routing(TOKENS))
    deltas = torch.randn(4, SAMPLES, TOKENS, WIDTH, dtype=torch.float64)
    actual = torch.vmap(lambda delta: by_rule(layer, *call, delta))(deltas)
    expected = torch.stack([by_autograd(layer, *call, delta) for delta in deltas])
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("layer_type", LAYERS)
def test_positions_without_gradient_do_not_count(layer_type):
    # Padding is routed too, and its gradient is zero.
    layer = build(layer_type)
    hidden = torch.randn(SAMPLES * TOKENS, WIDTH, dtype=torch.float64)
    index, weights = routing(TOKENS)
    delta = torch.randn(SAMPLES, TOKENS, WIDTH, dtype=torch.float64)
    delta[1, 2:] = 0
    kept = torch.arange(SAMPLES * TOKENS)[TOKENS : TOKENS + 2]
    alone = by_autograd(layer, hidden[kept], index[kept], weights[kept], delta[1:2, :2])
    torch.testing.assert_close(by_rule(layer, hidden, index, weights, delta)[1:2], alone, rtol=1e-11, atol=0)


@pytest.mark.parametrize("layer_type", LAYERS)
def test_bfloat16_sums_in_float32(layer_type):
    layer = build(layer_type, dtype=torch.bfloat16)
    hidden = torch.randn(SAMPLES * 60, WIDTH, dtype=torch.bfloat16)
    index, weights = routing(60)
    delta = torch.randn(SAMPLES, 60, WIDTH, dtype=torch.bfloat16)
    actual = by_rule(layer, hidden, index, weights.bfloat16(), delta)
    assert actual.dtype == torch.float32
    reference = by_autograd(layer.double(), hidden.double(), index, weights.bfloat16().double(), delta.double())
    torch.testing.assert_close(actual.double(), reference, rtol=2e-2, atol=0)


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            made = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
            self.elements = max(self.elements, *made, 0)
        return result


@pytest.mark.parametrize("layer_type", LAYERS)
def test_no_weight_gradient_is_formed(layer_type):
    layer = build(layer_type, width=64, inner=64)
    call = (torch.randn(SAMPLES * TOKENS, 64, dtype=torch.float64), *routing(TOKENS))
    delta = torch.randn(SAMPLES, TOKENS, 64, dtype=torch.float64)
    with torch.no_grad(), Largest() as made:
        by_rule(layer, *call, delta)
    assert made.elements < layer.down_proj[0].numel()
    # It would be seen.
    with Largest() as made:
        by_autograd(layer, *call, delta)
    assert made.elements >= layer.gate_up_proj.numel()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", MIXTURES)
def test_every_implementation(name, implementation):
    model = ARCHITECTURES[name].build(tied=False)
    samples = [([3, 4, 5, 5, 9], [7, 8, 9]), ([3, 4, 20], [3, 4, 20, 21, 22, 5]), ([11], [5])]
    expected = [Oracle(model).score(*sample)[1] for sample in samples]
    model = model.float()
    model.set_experts_implementation(implementation)
    actual = gradient_pass(model, cover(model), samples).grad_norm_sq.tolist()
    assert actual == pytest.approx(expected, rel=1e-5)
