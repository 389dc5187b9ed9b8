"""What scoring takes on a GPU, beside the estimate that room is left by; skipped where there is none."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from gnuq_serve import Sample, Scorer
from gnuq_serve.weights.estimate import estimate

pytestmark = pytest.mark.gpu

TOKENS = 512


@pytest.mark.parametrize("answer_tokens", [1, TOKENS])
def test_a_pass_stays_within_the_estimate(tmp_path, answer_tokens):
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=2 * TOKENS,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path)
    expected = estimate(str(tmp_path), "bfloat16", TOKENS)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to("cuda")
    scorer = Scorer.from_model(model, memory_budget="64GiB")
    sample = Sample([7] * (TOKENS + 1 - answer_tokens), [9] * answer_tokens)
    scorer.score([sample])  # the libraries' own workspaces come with the first
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    scorer.score([sample])
    taken = torch.cuda.max_memory_allocated() - before
    assert sum(p.nbytes for p in model.parameters()) == expected.weights
    assert 0.2 * expected.pass_bytes < taken < 1.1 * expected.pass_bytes
