"""SemGrad and its relatives against their definitions by autograd."""

import dataclasses

import pytest
import torch
from left_clean import tensors_kept_by, unchanged
from tiny_families import ANSWER, FAMILIES, PROMPT, SAMPLES, tiny, worst

from gnuq_serve.gradnorm import cover, gradient_pass, semantic
from gnuq_serve.gradnorm.oracle import Oracle, OracleSemantic

NAMES = [field.name for field in dataclasses.fields(OracleSemantic)]


def assert_exact(model, samples, **options):
    oracle = Oracle(model)
    expected = [oracle.semantic(*sample, options.get("position")) for sample in samples]
    result = gradient_pass(model, cover(model), samples, semantic=True, **options).semantic
    for name in NAMES:
        assert worst(getattr(result, name), [getattr(e, name) for e in expected]) <= 1e-9, name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact(family, tied):
    assert_exact(tiny(family, tied=tied), [(PROMPT, ANSWER)])


@pytest.mark.parametrize("recompute", [0, 2, 3])
@pytest.mark.parametrize("position", [None, -1, -3])
def test_batches_and_positions(position, recompute):
    samples = [sample for sample in SAMPLES if position is None or len(sample[0]) >= -position]
    assert_exact(tiny("llama", tied=True), samples, position=position, recompute=recompute)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("gemma3_text", {"final_logit_softcapping": 2.0}), ("granite", {"logits_scaling": 3.0})],
)
def test_capped_and_scaled_logits(family, settings):
    # The head's own gradient lies before the cap.
    assert_exact(tiny(family, tied=True, **settings), [(PROMPT, ANSWER)])


def test_the_head_in_tiles(monkeypatch):
    monkeypatch.setattr(semantic, "TILE_BYTES", 7 * 32 * 8)  # 7 of 101 rows of the head
    assert_exact(tiny("llama"), SAMPLES)


def test_only_where_asked_for():
    model = tiny("llama")
    assert gradient_pass(model, cover(model), SAMPLES).semantic is None


def test_nothing_is_left_behind():
    model = tiny("llama", tied=True).train()
    coverage = cover(model)
    with unchanged(model):
        assert tensors_kept_by(lambda: gradient_pass(model, coverage, SAMPLES, semantic=True)) == 0


def test_float32():
    model = tiny("llama", tied=True, dtype=torch.float32)
    result = gradient_pass(model, cover(model), [(PROMPT, ANSWER)], semantic=True).semantic
    expected = Oracle(model).semantic(PROMPT, ANSWER)
    for name in NAMES:
        assert getattr(result, name).item() == pytest.approx(getattr(expected, name), rel=1e-4)
