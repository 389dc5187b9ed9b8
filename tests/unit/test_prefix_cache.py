"""Kept keys and values of prompt prefixes: what is read again, what is kept, and the same numbers either way."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from left_clean import unchanged
from tiny_families import ANSWER, FAMILIES, PROMPT, tiny, worst

from gnuq_serve.gradnorm import cover, gradient_pass
from gnuq_serve.gradnorm.oracle import Oracle
from gnuq_serve.gradnorm.prefix import PrefixCache, joined

ROOM = 2**20
OTHER_END = [*PROMPT[:6], 70, 71, 72]
LONGER = [*PROMPT, 14, 15, 16, 17, 18]


@contextmanager
def tokens_read(model: Any) -> Iterator[list[list[int]]]:
    """The ids that the model's embedding was given, call by call."""
    calls: list[list[int]] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(
        lambda _module, args: calls.append(args[0].flatten().tolist())
    )
    try:
        yield calls
    finally:
        handle.remove()


def tensors(prefix: Any) -> list[torch.Tensor]:
    return [t for layer in prefix.layers for t in (layer.keys, layer.values)]


def norm_sq(model: Any, cache: PrefixCache, prompt: list[int], answer: list[int]) -> torch.Tensor:
    prefixes = [cache.keys_and_values(prompt[:-1])]
    return gradient_pass(model, cover(model), [(prompt, answer)], prefixes=prefixes).grad_norm_sq


@pytest.mark.parametrize("family", FAMILIES)
class TestNumbers:
    def test_a_kept_prefix_gives_the_same_bits(self, family):
        model = tiny(family)
        cache = PrefixCache(model, ROOM)
        cold = norm_sq(model, cache, PROMPT, ANSWER)
        with tokens_read(model) as calls:
            assert norm_sq(model, cache, PROMPT, ANSWER) == cold
        assert sum(map(len, calls)) == len(ANSWER)
        assert norm_sq(model, PrefixCache(model, ROOM), PROMPT, ANSWER) == cold

    @pytest.mark.parametrize(
        "prompt", [LONGER, OTHER_END, PROMPT[:4]], ids=["goes on", "parts ways", "is shorter"]
    )
    def test_prompts_that_begin_like_a_kept_one(self, family, prompt):
        model = tiny(family)
        cache = PrefixCache(model, ROOM)
        cache.keys_and_values(PROMPT[:-1])
        expected = Oracle(model).answer_only(prompt, ANSWER)[1]
        assert worst(norm_sq(model, cache, prompt, ANSWER), [expected]) <= 1e-9
        assert worst(norm_sq(model, PrefixCache(model, ROOM), prompt, ANSWER), [expected]) <= 1e-9


class TestWhatIsReadAgain:
    @pytest.mark.parametrize("family", ["llama", "gemma3_text"])
    def test_a_prompt_that_goes_on(self, family):
        model = tiny(family)
        cache = PrefixCache(model, ROOM)
        cache.keys_and_values(PROMPT)
        with tokens_read(model) as calls:
            cache.keys_and_values(LONGER)
        assert calls == [LONGER[len(PROMPT) :]]

    def test_a_shared_beginning(self):
        model = tiny("llama")
        cache = PrefixCache(model, ROOM)
        cache.keys_and_values(PROMPT)
        with tokens_read(model) as calls:
            cache.keys_and_values(OTHER_END)
            cache.keys_and_values(PROMPT[:4])
        assert calls == [OTHER_END[6:]]

    def test_the_longest_shared_beginning(self):
        model = tiny("llama")
        cache = PrefixCache(model, ROOM)
        for ids in (PROMPT[:3], PROMPT, PROMPT[:7]):
            cache.keys_and_values(ids)
        with tokens_read(model) as calls:
            cache.keys_and_values(LONGER)
        assert calls == [LONGER[len(PROMPT) :]]

    def test_windows_are_never_cut(self):
        model = tiny("gemma3_text")
        cache = PrefixCache(model, ROOM)
        cache.keys_and_values(PROMPT)
        with tokens_read(model) as calls:
            cache.keys_and_values(OTHER_END)
        assert calls == [OTHER_END]

    def test_nothing_of_an_empty_prefix(self):
        model = tiny("llama")
        with tokens_read(model) as calls:
            PrefixCache(model, ROOM).keys_and_values([])
        assert calls == []

    def test_everything_after_clear(self):
        model = tiny("llama")
        cache = PrefixCache(model, ROOM)
        cache.keys_and_values(PROMPT)
        cache.clear()
        assert cache.nbytes == 0
        with tokens_read(model) as calls:
            cache.keys_and_values(PROMPT)
        assert calls == [PROMPT]


class TestBytes:
    # Llama: 3 layers, keys and values, 2 heads of 8 float64 numbers.
    PER_TOKEN = 3 * 2 * 2 * 8 * 8

    def test_count(self):
        cache = PrefixCache(tiny("llama"), ROOM)
        cache.keys_and_values(PROMPT)
        assert cache.nbytes == len(PROMPT) * self.PER_TOKEN

    @pytest.mark.parametrize("family", FAMILIES)
    def test_no_more_is_kept_than_counted(self, family):
        model = tiny(family)
        cache = PrefixCache(model, ROOM)
        kept = [cache.keys_and_values(ids) for ids in (PROMPT, LONGER, OTHER_END, PROMPT[:4])]
        storages = [t.untyped_storage() for prefix in kept for t in tensors(prefix)]
        assert cache.nbytes == sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def test_the_prefix_used_longest_ago_goes_first(self):
        model = tiny("llama")
        cache = PrefixCache(model, 30 * self.PER_TOKEN)
        a, b, c = ([first, *range(10, 19)] for first in (1, 2, 3))
        for ids in (a, b, c, a, [4, *range(10, 19)]):
            cache.keys_and_values(ids)
        assert cache.nbytes == 30 * self.PER_TOKEN
        with tokens_read(model) as calls:
            for ids in (a, c):
                cache.keys_and_values(ids)
            assert calls == []
            cache.keys_and_values(b)
            assert calls == [b]

    def test_one_that_is_too_large_drives_out_no_other(self):
        model = tiny("llama")
        cache = PrefixCache(model, 12 * self.PER_TOKEN)
        cache.keys_and_values(PROMPT)
        assert tensors(cache.keys_and_values(LONGER))[0].shape[2] == len(LONGER)
        assert cache.nbytes == len(PROMPT) * self.PER_TOKEN


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_kept_prefixes_are_never_written_to(family):
    model = tiny(family)
    coverage = cover(model)
    cache = PrefixCache(model, ROOM)
    kept = cache.keys_and_values(PROMPT[:-1])
    before = [t.clone() for t in tensors(kept)]
    lengths = [layer.get_seq_length() for layer in kept.layers]
    for recompute in (0, 3):
        gradient_pass(model, coverage, [(PROMPT, ANSWER)], prefixes=[kept], recompute=recompute)
    if not coverage.slow:
        gradient_pass(model, coverage, [(PROMPT, ANSWER), (PROMPT, [3])], prefixes=[kept, kept])
    cache.keys_and_values(LONGER)
    cache.keys_and_values(OTHER_END)
    cache.keys_and_values(PROMPT[:4])
    assert [layer.get_seq_length() for layer in kept.layers] == lengths
    assert all(torch.equal(a, b) for a, b in zip(tensors(kept), before, strict=True))


def test_a_joined_cache_gives_what_is_new_and_keeps_it_not():
    kept = PrefixCache(tiny("llama"), ROOM).keys_and_values(PROMPT)
    cache = joined([kept, kept])
    new = torch.ones(2, 2, 3, 8, dtype=torch.float64)
    for _ in range(2):
        keys, values = cache.update(new, 2 * new, 1)
        old = kept.layers[1].keys.expand(2, -1, -1, -1)
        assert torch.equal(keys, torch.cat([old, new], dim=2))
        assert torch.equal(values[:, :, -3:], 2 * new)
        assert cache.get_seq_length() == len(PROMPT)


class TestTheModelIsLeftAsItWas:
    def test_training_mode_by_module(self):
        model = tiny("gpt2").train()
        model.transformer.h[1].eval()
        cache = PrefixCache(model, ROOM)
        with unchanged(model):
            first = tensors(cache.keys_and_values(PROMPT))
        # No dropout was drawn.
        again = tensors(PrefixCache(model, ROOM).keys_and_values(PROMPT))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_after_an_error_nothing_is_kept(self):
        model = tiny("gpt2").train()
        cache = PrefixCache(model, ROOM)
        with unchanged(model), pytest.raises(IndexError):
            cache.keys_and_values([1, 2, 1000])
        assert cache.nbytes == 0

    def test_kept_tensors_have_no_graph(self):
        cache = PrefixCache(tiny("llama"), ROOM)
        with torch.enable_grad():
            assert not any(t.requires_grad for t in tensors(cache.keys_and_values(PROMPT)))
        with torch.inference_mode():
            assert not any(t.is_inference() for t in tensors(cache.keys_and_values(LONGER)))
