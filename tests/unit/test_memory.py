"""What a pass is said to take beyond the weights, beside what it takes."""

import gc

import pytest
import torch
from left_clean import unchanged
from live_memory import LiveMemory
from tiny_families import tiny

from gnuq_serve.gradnorm import cover, gradient_pass, token_grad_norms
from gnuq_serve.gradnorm.memory import default_budget, measure, parse_bytes
from gnuq_serve.gradnorm.prefix import PrefixCache

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "max_position_embeddings": 1024}
KINDS = {
    "llama": ("llama", SIZES),
    "llama, eager attention": ("llama", SIZES | {"attn_implementation": "eager"}),
    "llama, large vocabulary": ("llama", SIZES | {"vocab_size": 20_000}),
    "llama, large vocabulary, bfloat16": ("llama", SIZES | {"vocab_size": 20_000}),
    "gpt2": ("gpt2", SIZES),
    "gemma3, windows": (
        "gemma3_text",
        SIZES | {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "mixtral": ("mixtral", SIZES),
}


def build(name):
    family, settings = KINDS[name]
    model = tiny(family, tied=True, dtype=torch.bfloat16 if "bfloat16" in name else torch.float32, **settings)
    return model, cover(model)


@pytest.fixture(scope="module", params=KINDS)
def any_kind(request):
    return build(request.param)


@pytest.fixture(scope="module", params=["llama, eager attention", "gemma3, windows"])
def kind(request):
    return build(request.param)


def pairs(samples: int, positions: int, answer: int):
    return [([1 + i % 90 for i in range(positions - answer + 1)], [5] * answer) for _ in range(samples)]


def peak(model, run) -> int:
    with LiveMemory(model) as live:
        run()
    return live.peak


@pytest.mark.parametrize(
    ("samples", "positions", "answer"), [(1, 32, 8), (4, 128, 8), (2, 200, 100), (1, 600, 8)]
)
def test_exact(any_kind, samples, positions, answer):
    model, coverage = any_kind
    said = measure(model, coverage).bytes(positions, samples, samples * answer)
    taken = peak(model, lambda: gradient_pass(model, coverage, pairs(samples, positions, answer)))
    assert 0.95 < said / taken < 1.3


def test_nothing_stays_behind(any_kind):
    model, coverage = any_kind
    with LiveMemory(model) as live:
        measure(model, coverage)
        result = gradient_pass(model, coverage, pairs(2, 60, 30), semantic=True)
        del result
        gc.collect()
    assert live.now < live.peak / 100  # what models keep of their masks and positions


def test_semantic(any_kind):
    model, coverage = any_kind
    said = measure(model, coverage).bytes(60, 2, 2 * 30, semantic=True)
    taken = peak(model, lambda: gradient_pass(model, coverage, pairs(2, 60, 30), semantic=True))
    assert 0.95 < said / taken < 1.3


@pytest.mark.parametrize("blocks", [1, 4])
def test_recomputed(kind, blocks):
    model, coverage = kind
    memory = measure(model, coverage)
    said = memory.bytes(300, 1, 8, recompute=blocks)
    taken = peak(model, lambda: gradient_pass(model, coverage, pairs(1, 300, 8), recompute=blocks))
    assert 0.9 < said / taken < 1.5
    assert said < memory.bytes(300, 1, 8)


@pytest.mark.parametrize(("samples", "prompt", "answer"), [(1, 300, 8), (3, 100, 30)])
def test_answer_only(kind, samples, prompt, answer):
    model, coverage = kind
    memory = measure(model, coverage, answer_only=True)
    batch = pairs(samples, prompt + answer - 1, answer)
    said = memory.bytes(answer, samples, samples * answer, prefix=prompt - 1)

    def run() -> None:
        prefixes = [PrefixCache(model, 0).keys_and_values(ids[:-1]) for ids, _ in batch]
        gradient_pass(model, coverage, batch, prefixes=prefixes)

    taken = peak(model, run)
    said += samples * (prompt - 1) * memory.per_cached_token
    assert 0.95 < said / taken < 2  # with windows fewer keys are kept than said


@pytest.mark.parametrize("at_once", [1, 6])
def test_trace(kind, at_once):
    model, coverage = kind
    said = measure(model, coverage).bytes(200, 1, 6, at_once=at_once)
    (sample,) = pairs(1, 200, 6)
    taken = peak(model, lambda: token_grad_norms(model, coverage, sample, at_once=at_once))
    assert 0.9 < said / taken < 1.7


def test_eager_attention_is_found_to_be_quadratic(any_kind):
    model, coverage = any_kind
    memory = measure(model, coverage)
    eager = model.config._attn_implementation == "eager"
    # Probabilities of every head, in float32.
    heads = model.config.num_attention_heads
    assert memory.per_pair == (pytest.approx(4 * heads * memory.blocks) if eager else 0)
    assert (memory.per_pair_windowed > 0) == (memory.window is not None)


def test_measuring_leaves_nothing_behind(kind):
    model, coverage = kind
    model.train()
    try:
        with unchanged(model):
            window = getattr(model.config, "sliding_window", None)
            measure(model, coverage)
            measure(model, coverage, answer_only=True)
            assert getattr(model.config, "sliding_window", None) == window
    finally:
        model.eval()


@pytest.mark.parametrize("context", [4, 9, 20])
def test_context_shorter_than_the_passes_that_measure(context):
    model = tiny("gpt2", dtype=torch.float32, n_positions=context)
    long = tiny("gpt2", dtype=torch.float32)
    assert measure(model, cover(model)).per_token == pytest.approx(measure(long, cover(long)).per_token, rel=0.2)


def test_half_precision_takes_less():
    sizes = {dtype: tiny("llama", dtype=dtype, **SIZES) for dtype in (torch.float32, torch.bfloat16)}
    memories = {dtype: measure(model, cover(model)) for dtype, model in sizes.items()}
    assert 0.4 < memories[torch.bfloat16].per_token / memories[torch.float32].per_token < 0.7


def test_budget_of_a_cpu():
    assert 0 < default_budget(torch.device("cpu")) <= 2 * 2**30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (12345, 12345),
        ("12345", 12345),
        ("1k", 1000),
        ("2 KiB", 2048),
        ("500MB", 500_000_000),
        ("1.5GiB", 3 * 2**29),
        ("2g", 2 * 10**9),
        (" 3 GiB ", 3 * 2**30),
    ],
)
def test_amounts(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "0", 0, -5, "-1GiB", "2TiB", "1.2.3MB", "GiB"])
def test_what_is_no_amount(text):
    with pytest.raises(
        ValueError, match=r"^memory_budget=.* is no amount of memory; give bytes, or a text such as"
    ):
        parse_bytes(text)
