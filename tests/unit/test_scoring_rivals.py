"""The benchmark's rivals compute what they are said to: against plain autograd in float64, on tiny models."""

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rivals import ALL, FORWARD, FUNC, LIMIT, NAIVE, OPACUS, OURS, build
from rivals.opacus_ghost import OpacusGhostNorms, untied_copy
from rivals.padded import NO_TARGET, Padded
from rivals.peak import peak_mib
from rivals.same_batches import batches_of
from rivals.samples import Prompts, read_prompts
from rivals.timing import Timings, interleaved
from rivals.token_traces import KeptGraph, PassPerToken
from rivals.torch_func import PerSampleGradients
from scoring import headline

from gnuq_serve import Sample, Scorer
from gnuq_serve.gradnorm.oracle import Oracle, count_padding_rows

PAD = 5
SAMPLES = [
    Sample([7], [8]),
    Sample([1, PAD, 12, PAD, 40, 12, 13], [14, 2]),
    Sample([3, 9, 27, 3, 3, 60], [9]),
    Sample([50, 51, 52], [PAD, 53, 50, 2, 61, 61]),
    Sample([*range(20, 40)], [33, 34, 35, 90]),
]


@pytest.fixture
def model(tiny_llama) -> Any:
    model = tiny_llama(tied=True, dtype=torch.float64)
    count_padding_rows(model)
    return model


def expected(model: Any) -> list[float]:
    oracle = Oracle(model)
    return [oracle.score(sample.prompt_ids, sample.answer_ids)[1] for sample in SAMPLES]


@pytest.mark.parametrize("name", [OURS, NAIVE, FUNC])
@pytest.mark.parametrize("tied", [True, False])
def test_norms(tiny_llama, name, tied):
    model = tiny_llama(tied, dtype=torch.float64)
    count_padding_rows(model)
    assert build(name, Scorer(model))(SAMPLES) == pytest.approx(expected(model), rel=1e-9)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_of_per_sample_gradients(model, chunk):
    assert PerSampleGradients(model, chunk)(SAMPLES) == pytest.approx(expected(model), rel=1e-9)


@pytest.mark.parametrize("max_batch_tokens", [1, 50, 2048])
def test_opacus_has_the_norms_of_the_untied_model(model, max_batch_tokens):
    pytest.importorskip("opacus")
    untied = expected(untied_copy(model))
    assert untied != pytest.approx(expected(model), rel=1e-3)
    rival = OpacusGhostNorms(model, max_batch_tokens)
    assert rival(SAMPLES) == pytest.approx(untied, rel=1e-9)
    assert rival(SAMPLES) == pytest.approx(untied, rel=1e-9)  # nothing is left over from the call before


def test_the_limit_backpropagates_our_log_probability_to_the_embeddings(model, monkeypatch):
    """What it differentiates is ``-l``, and it gets a gradient at every position that the answer depends on."""
    seen: list[tuple[float, torch.Tensor]] = []
    real = torch.autograd.grad

    def watched(loss: torch.Tensor, embedded: torch.Tensor) -> Any:
        (gradient,) = real(loss, embedded)
        seen.append((loss.item(), gradient))
        return (gradient,)

    oracle = Oracle(model)
    total = math.fsum(oracle.score(sample.prompt_ids, sample.answer_ids)[0] for sample in SAMPLES)
    limit = build(LIMIT, Scorer(model, max_batch_tokens=60))
    limit.prepare(SAMPLES)
    monkeypatch.setattr(torch.autograd, "grad", watched)
    limit(SAMPLES)
    assert math.fsum(loss for loss, _ in seen) == pytest.approx(-total, rel=1e-9)
    reached = sum(int((gradient.abs().sum(-1) > 0).sum()) for _, gradient in seen)
    assert len(seen) > 1
    assert reached == sum(sample.length for sample in SAMPLES)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("max_batch_tokens", [1, 30, 2048])
def test_batches_are_the_scorers_own(model, max_batch_tokens):
    scorer = Scorer(model, max_batch_tokens=max_batch_tokens)
    samples = [*SAMPLES, SAMPLES[1], Sample([7], [8, 9])]  # one twice; one that begins like another
    batches = batches_of(scorer, samples)
    assert sorted(map(repr, (s for batch in batches for s in batch))) == sorted(map(repr, samples))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(s.length for s in batch) <= max_batch_tokens
    assert (len(batches) == len(samples)) == (max_batch_tokens == 1)


class TestTraces:
    SAMPLE = SAMPLES[3]

    def expected(self, model: Any) -> list[float]:
        """From the gradient of each token's log-probability, the sample cut behind that token."""
        oracle = Oracle(model)
        prompt, answer = list(self.SAMPLE.prompt_ids), list(self.SAMPLE.answer_ids)
        norms = []
        for t in range(len(answer)):
            log_p, norm_sq = oracle.score([*prompt, *answer[:t]], [answer[t]])
            norms.append(math.exp(2 * log_p) * norm_sq)  # grad p = p grad log p
        return norms

    @pytest.mark.parametrize("way", [PassPerToken, lambda m: PassPerToken(m, prefix_only=True), KeptGraph])
    def test_equal_the_oracle(self, model, way):
        # RMSNorm computes in float32 whatever the model's dtype; grad p and grad log p round differently there.
        expected = self.expected(model)
        assert way(model)(self.SAMPLE, range(6)) == pytest.approx(expected, rel=1e-6)
        assert way(model)(self.SAMPLE, [1, 4]) == pytest.approx([expected[1], expected[4]], rel=1e-6)


@pytest.mark.parametrize("name", [name for name in ALL if name != OPACUS])
def test_the_model_is_left_as_it_was(model, name):
    model.requires_grad_(False)
    build(name, Scorer(model))(SAMPLES[:2])
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())


def test_forward_only_returns_no_norms(model):
    assert build(FORWARD, Scorer(model))(SAMPLES) == []


def test_padded_rows():
    batch = Padded.of([Sample([1, 2, 3], [4, 5]), Sample([6, 7], [8])])
    assert batch.ids.tolist() == [[1, 2, 3, 4], [6, 7, 0, 0]]
    assert batch.targets.tolist() == [[NO_TARGET, 4, 5], [8, NO_TARGET, NO_TARGET]]


def test_methods_take_turns(monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # slow where a test session has much to look through
    order: list[str] = []
    timings = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": lambda: order.append("c")},
        3,
        before={"b": lambda: order.append("before b")},
        once=frozenset({"c"}),
    )
    assert order == ["a", "before b", "b", "c", "before b", "b", "a", "a", "before b", "b"]
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {"a": 3, "b": 3, "c": 1}


def test_ratio_of_medians():
    timings = Timings({"slow": [9.0, 8.0, 100.0], "fast": [3.0, 1.0, 2.0]})
    assert timings.ratio("slow", "fast") == 4.5
    assert timings.ratio("slow", "absent") is None


def test_headline_takes_the_worst_of_the_groups_that_count():
    def record(samples: int, longest: int, faster: float | None, limit: float) -> dict[str, Any]:
        return {
            "samples": samples,
            "tokens_longest": longest,
            "throughput_vs_naive": faster,
            "time_vs_limit": limit,
        }

    figures = headline(
        {
            "batches": [record(16, 90, 2.5, 1.1), record(16, 300, 1.0, 3.0)],
            "lengths": [record(16, 96, 2.25, 1.0), record(16, 128, 1.5, 1.2), record(4, 64, 0.5, 9.0)],
            "memory": [{"extra_memory_vs_naive": 0.2}, {"extra_memory_vs_naive": 0.3}, {"mib": {}}],
        }
    )
    assert (figures["throughput_vs_naive"], figures["time_vs_limit"]) == (2.25, 1.2)
    assert figures["extra_memory_vs_naive"] == 0.3
    assert figures["trace_vs_loop"] is None


@pytest.mark.slow
def test_peak_memory_of_a_process_of_its_own():
    """The naive loop holds a gradient as large as the weights (135M parameters), a forward pass doesn't."""
    sample = Sample([*range(100, 200)], [*range(200, 260)])  # shorter ones fit into what the warm-up left free
    gradient_mib = 134_515_008 * 4 / 2**20
    assert gradient_mib < peak_mib(NAIVE, [sample], threads=1) < 2 * gradient_mib
    assert 0 < peak_mib(FORWARD, [sample], threads=1) < gradient_mib / 4


class TestPrompts:
    def test_questions_and_turns(self, tmp_path: Path):
        file = tmp_path / "mixed.jsonl"
        file.write_text('{"question": "Why?"}\n{"turns": ["First.", "Second."]}\n')
        assert read_prompts([file]) == [Prompts("mixed", ["Why?", "First."])]

    def test_row_without_either(self, tmp_path: Path):
        file = tmp_path / "other.jsonl"
        file.write_text('{"question": "Why?"}\n{"text": "no"}\n')
        with pytest.raises(ValueError, match=r"other\.jsonl, line 2: neither `question` nor `turns`"):
            read_prompts([file])

    def test_built_in_lists_are_long_enough_for_a_batch(self):
        assert all(len(set(group.texts)) >= 16 for group in read_prompts([]))
