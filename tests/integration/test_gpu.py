"""The pass on a GPU; skipped where there is none."""

import pytest
import torch

from gnuq_serve import Sample, Scorer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_same_number_as_on_the_cpu(tiny_llama, dtype, tolerance):
    model = tiny_llama(tied=True).to(dtype)
    samples = [Sample([3, 1, 4, 1], [5, 9, 2]), Sample([6], [5, 3, 5, 8, 9])]
    expected = Scorer.from_model(model).score(samples)
    found = Scorer.from_model(model.to("cuda")).score(samples)
    for cpu, gpu in zip(expected, found, strict=True):
        assert gpu.log_probability == pytest.approx(cpu.log_probability, rel=tolerance)
        assert gpu.log_grad_norm_sq == pytest.approx(cpu.log_grad_norm_sq, abs=tolerance)
