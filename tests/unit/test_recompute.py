"""Blocks that keep their input only and run again on the way down."""

from collections import Counter

import pytest
import torch
from left_clean import tensors_kept_by, unchanged
from tiny_families import ANSWER, FAMILIES, PROMPT, SAMPLES, tiny, worst

from gnuq_serve.gradnorm import cover, gradient_pass
from gnuq_serve.gradnorm.recompute import recomputed


@pytest.mark.parametrize("recompute", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_numbers(family, recompute):
    model = tiny(family, tied=True)
    coverage = cover(model)
    samples = [(PROMPT, ANSWER)] if coverage.slow else SAMPLES
    plain = gradient_pass(model, coverage, samples, semantic=True)
    again = gradient_pass(model, coverage, samples, semantic=True, recompute=recompute)
    assert worst(again.grad_norm_sq, plain.grad_norm_sq) <= 1e-12
    assert worst(again.hidden_grad, plain.hidden_grad) <= 1e-12
    assert worst(again.input_grad_norm_sq, plain.input_grad_norm_sq) <= 1e-12
    assert worst(again.semantic.hybridgrad, plain.semantic.hybridgrad) <= 1e-12
    assert worst(torch.cat(again.token_log_probabilities), torch.cat(plain.token_log_probabilities)) <= 1e-12


def test_only_the_first_blocks_run_again():
    model = tiny("llama")
    coverage = cover(model)
    runs: Counter[int] = Counter()
    for i, block in enumerate(coverage.blocks):
        block.self_attn.register_forward_hook(lambda *_, i=i: runs.update([i]))
    gradient_pass(model, coverage, SAMPLES, recompute=2)
    assert runs == {0: 2, 1: 2, 2: 1}


def test_less_is_kept():
    model = tiny("llama")
    coverage = cover(model)

    def kept(recompute: int) -> int:
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        largest = 0

        def down(*_: object) -> None:  # before anything runs again
            nonlocal largest
            largest = largest or sum(storage.nbytes() for storage in storages.values())

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            handle = model.lm_head.register_forward_pre_hook(down)
            gradient_pass(model, coverage, SAMPLES, recompute=recompute)
            handle.remove()
        return largest

    amounts = [kept(recompute) for recompute in range(4)]
    assert amounts == sorted(amounts, reverse=True)
    assert amounts[3] < 0.25 * amounts[0]


class TestTheBlocksAreLeftAsTheyWere:
    @pytest.fixture
    def model(self):
        return tiny("gpt2", tied=True).train()

    def test_after_a_pass(self, model):
        with unchanged(model):
            assert tensors_kept_by(lambda: gradient_pass(model, cover(model), SAMPLES, recompute=3)) == 0

    def test_after_an_error_on_the_way_up(self, model):
        with unchanged(model), pytest.raises(IndexError):
            gradient_pass(model, cover(model), [([1, 1000], [2])], recompute=3)

    def test_after_an_error_in_a_block_that_runs_again(self, model, monkeypatch):
        runs = 0

        def failing(*args: object, **kwargs: object) -> torch.Tensor:
            nonlocal runs
            runs += 1
            if runs == 2:
                raise ArithmeticError("second run")
            return forward(*args, **kwargs)

        mlp = model.transformer.h[1].mlp
        forward = mlp.forward
        monkeypatch.setattr(mlp, "forward", failing)
        with unchanged(model), pytest.raises(ArithmeticError, match="second run"):
            gradient_pass(model, cover(model), SAMPLES, recompute=3)

    def test_a_forward_of_the_instance_is_kept(self, model):
        block = model.transformer.h[0]
        usual = block.forward

        def own(*args: object, **kwargs: object) -> object:
            return usual(*args, **kwargs)

        block.forward = own
        with recomputed([block]):
            assert block.forward is not own
        assert block.forward is own


@pytest.mark.parametrize("by", ["block", "next block"])
def test_input_changed_in_place_is_noticed(by):
    model = tiny("llama")
    block = model.model.layers[1]
    usual = block.forward
    kept: list[torch.Tensor] = []

    def overwriting(hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
        if by == "block":
            torch.autograd.graph.increment_version(hidden)
        kept.append(hidden)
        return usual(hidden, *args, **kwargs)

    def overwriting_later(*_: object) -> None:
        if by == "next block":
            torch.autograd.graph.increment_version(kept[0])

    block.forward = overwriting
    model.model.layers[2].register_forward_pre_hook(overwriting_later)
    message = r"changed its input in place" if by == "block" else r"modified by an inplace operation"
    with pytest.raises(RuntimeError, match=message):
        gradient_pass(model, cover(model), [(PROMPT, ANSWER)], recompute=3)
