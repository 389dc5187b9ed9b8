"""Gemma 3 270M, real weights: the pass against plain autograd in float64."""

import pytest
from models import gemma3_270m

from gnuq_serve.gradnorm import cover, gradient_pass
from gnuq_serve.gradnorm.oracle import Oracle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not gemma3_270m.is_installed(), reason=gemma3_270m.MISSING),
]


def test_real_weights(tmp_path):
    model, tokenizer = gemma3_270m.load(tmp_path)
    samples = gemma3_270m.samples(tokenizer)
    coverage = cover(model)
    assert coverage.slow == []
    assert coverage.tied
    assert len(coverage.blocks) == 18
    oracle = Oracle(model)
    expected = [oracle.score(*sample)[1] for sample in samples]
    del oracle
    float32 = gradient_pass(model, coverage, samples).grad_norm_sq.tolist()
    assert float32 == pytest.approx(expected, rel=1e-3)
    float64 = gradient_pass(model.double(), coverage, samples).grad_norm_sq.tolist()
    assert float64 == pytest.approx(expected, rel=1e-6)
