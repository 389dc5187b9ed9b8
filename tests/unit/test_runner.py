"""Passes over many samples: packing, memory that runs out, interruptions, what is asked for beside the norm."""

import itertools
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from left_clean import unchanged
from live_memory import LiveMemory
from tiny_families import tiny

from gnuq_serve import Sample, Scorer
from gnuq_serve.gradnorm import registry, runner
from gnuq_serve.gradnorm.packing import Size, batches


@pytest.fixture(scope="module")
def model():
    return tiny("llama", tied=True, max_position_embeddings=512)


def ids(count, seed):
    draw = random.Random(seed)
    return [draw.randrange(101) for _ in range(count)]


@pytest.fixture(scope="module")
def samples():
    """Ten, of unlike lengths; the last is the longest but one."""
    lengths = [(20, 3), (1, 1), (7, 12), (40, 2), (1, 9), (3, 1), (20, 3), (11, 30), (2, 2), (60, 4)]
    return [Sample(ids(prompt, i), ids(answer, -1 - i)) for i, (prompt, answer) in enumerate(lengths)]


@pytest.fixture(scope="module")
def alone(model, samples):
    """The results of the samples, one pass for each."""
    return one_by_one(model, samples)


@pytest.fixture
def asked(monkeypatch):
    """The keyword arguments of each gradient pass, and the lengths of its samples."""
    seen = []
    real = runner.gradient_pass

    def counted(model, coverage, pairs, **options):
        seen.append({"lengths": [len(p) + len(a) - 1 for p, a in pairs], "pairs": pairs} | options)
        return real(model, coverage, pairs, **options)

    monkeypatch.setattr(runner, "gradient_pass", counted)
    return seen


def equal(results, expected, rel=1e-9):
    for result, other in zip(results, expected, strict=True):
        assert result.status == other.status == "scored"
        assert result.log_probability == pytest.approx(other.log_probability, rel=rel)
        assert result.log_grad_norm_sq == pytest.approx(other.log_grad_norm_sq, rel=rel)
        assert result.signals.log_hidden_grad == pytest.approx(other.signals.log_hidden_grad, rel=rel)
        if result.trace is not None:
            assert result.trace.epistemic == pytest.approx(other.trace.epistemic, rel=rel)


def one_by_one(model, samples, **options):
    return [result for sample in samples for result in Scorer(model).score([sample], **options)]


class TestPacking:
    @pytest.fixture(params=range(5))
    def pairs(self, request):
        draw = random.Random(request.param)
        prompts = [ids(draw.randint(1, 50), i) for i in range(12)]
        return [(draw.choice(prompts), ids(draw.randint(1, 40), i)) for i in range(60)]

    @pytest.mark.parametrize("answer_only", [False, True])
    @pytest.mark.parametrize(("limit", "overhead"), [(1, 64), (100, 0), (300, 64), (10**6, 32), (10**6, 10**6)])
    def test_batches(self, pairs, answer_only, limit, overhead):
        def visited(i):
            return len(pairs[i][1]) + (0 if answer_only else len(pairs[i][0]) - 1)

        def allowed(batch):
            longest = max(map(visited, batch))
            return (
                longest * len(batch) <= limit
                and longest * len(batch) - sum(map(visited, batch)) <= overhead
                and (not answer_only or len({len(pairs[i][0]) for i in batch}) == 1)
            )

        made = list(batches(pairs, answer_only, overhead, lambda size: size.padded <= limit))
        assert sorted(i for batch in made for i in batch) == list(range(len(pairs)))
        assert all(len(batch) == 1 or allowed(batch) for batch in made)
        for batch, following in itertools.pairwise(made):
            assert not allowed([*batch, following[0]])  # no pass was wasted
        order = [i for batch in made for i in batch]
        if answer_only:  # a prefix is computed once and need not be kept for long
            runs = [prompt for prompt, _ in itertools.groupby(tuple(pairs[i][0]) for i in order)]
            assert len(runs) == len(set(runs))
        else:
            assert [visited(i) for i in order] == sorted(map(visited, range(len(pairs))), reverse=True)

    def test_size(self, pairs):
        for answer_only in (False, True):
            batch = [(p, a) for p, a in pairs if len(p) == len(pairs[0][0])]
            visited = [len(a) if answer_only else len(p) + len(a) - 1 for p, a in batch]
            size = Size.of(batch, answer_only)
            assert (size.samples, size.longest, size.filled) == (len(batch), max(visited), sum(visited))
            assert size.answer_tokens == sum(len(a) for _, a in batch)
            assert size.prefix == (len(batch[0][0]) - 1 if answer_only else 0)
            assert size.prompts == len({tuple(p) for p, _ in batch})
            assert size.padded == len(batch) * max(visited)
            assert size.padding == size.padded - sum(visited)

    def test_nothing(self):
        assert list(batches([], False, 32, lambda _: True)) == []


class TestBudget:
    @pytest.mark.parametrize("limit", [1, 30, 64, 130])
    def test_tokens(self, model, samples, alone, asked, limit):
        results = Scorer(model, max_batch_tokens=limit).score(samples)
        equal(results, alone)
        for made in asked:
            assert len(made["lengths"]) == 1 or len(made["lengths"]) * max(made["lengths"]) <= limit

    def test_memory(self, model, asked):
        many = [Sample(ids(30, i), ids(5, -i)) for i in range(6)]
        alone = Scorer(model)
        alone.score(many[:1])
        with LiveMemory(model) as live:
            alone.score(many[:1])
        for samples_at_once in (1, 3):
            asked.clear()
            budget = int(1.35 * live.peak * samples_at_once)
            scorer = Scorer(model, memory_budget=budget)
            assert scorer.memory.per_token > 0  # measured before we look
            with LiveMemory(model) as batched:
                results = scorer.score(many)
            assert samples_at_once <= max(len(made["lengths"]) for made in asked) < 2 * samples_at_once + 1
            assert batched.peak <= budget
            equal(results, one_by_one(model, many))

    @pytest.mark.parametrize("mode", ["exact", "answer_only"])
    def test_a_long_sample_over_the_budget_runs_blocks_twice(self, model, asked, mode):
        long = Sample(ids(150, 1), ids(18, 2))
        options = {"mode": mode, "trace": True}
        (plenty,) = Scorer(model).score([long], **options)
        assert asked.pop()["recompute"] == 0
        budget = 2**16
        (scarce,) = Scorer(model, memory_budget=budget).score([long], **options)
        assert asked.pop()["recompute"] == 3
        if mode == "answer_only":
            assert scarce.log_grad_norm_sq == pytest.approx(plenty.log_grad_norm_sq, rel=1e-9)
            assert scarce.trace.epistemic == pytest.approx(plenty.trace.epistemic, rel=1e-9)
        else:
            equal([scarce], [plenty])

    def test_only_as_many_blocks_as_needed(self, model, asked):
        long = Sample(ids(150, 1), ids(5, 2))
        memory = Scorer(model).memory
        for blocks in range(3):
            budget = memory.bytes(154, 1, 5, recompute=blocks)
            Scorer(model, memory_budget=budget).score([long])
            assert asked.pop()["recompute"] == blocks

    def test_fewer_tokens_of_a_trace_come_down_together(self, model, monkeypatch):
        at_once = []
        real = runner.token_grad_norms

        def counted(*args, **options):
            at_once.append(options["at_once"])
            return real(*args, **options)

        monkeypatch.setattr(runner, "token_grad_norms", counted)
        sample = Sample(ids(60, 1), ids(9, 2))
        memory = Scorer(model).memory
        for tokens in (1, 3, 8):
            budget = memory.bytes(68, 1, 9, at_once=tokens)
            (result,) = Scorer(model, memory_budget=budget).score([sample], trace=True)
            assert at_once.pop() == tokens
            equal([result], one_by_one(model, [sample], trace=True))
            at_once.clear()


def run_out(*_args, **_kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def ask_for_a_petabyte(*_args, **_kwargs):
    torch.empty(2**50)


class Scarce:
    """While it stands, the second block has no memory for passes that are too large."""

    def __init__(self, model, too_large, error=run_out):
        self.sizes = []
        self._model, self._too_large, self._error = model, too_large, error

    def __enter__(self):
        def before(_block, args):
            hidden = args[0]
            self.sizes.append(tuple(hidden.shape[:2]))
            if self._too_large(hidden):
                self._error()

        self._handle = self._model.model.layers[1].register_forward_pre_hook(before)
        return self

    def __exit__(self, *_):
        self._handle.remove()


class TestOutOfMemory:
    @pytest.mark.parametrize(
        ("error", "options"),
        [
            (run_out, {}),
            (run_out, {"mode": "answer_only"}),
            (run_out, {"trace": True}),
            (ask_for_a_petabyte, {}),
        ],
    )
    def test_a_batch_is_split(self, model, error, options):
        many = [Sample(ids(12, i), ids(3, -i)) for i in range(5)]
        expected = one_by_one(model, many, **options)
        scorer = Scorer(model)
        scorer.score(many[:1], **options)  # so that memory has been measured
        with Scarce(model, lambda hidden: len(hidden) > 2, error) as scarce:
            results = scorer.score(many, **options)
        for result, other in zip(results, expected, strict=True):
            assert result.log_grad_norm_sq == pytest.approx(other.log_grad_norm_sq, rel=1e-9)
            assert result.trace == other.trace or result.trace.epistemic == pytest.approx(other.trace.epistemic)
        assert {size[0] for size in scarce.sizes} >= {5, 2}

    @pytest.mark.parametrize("error", [run_out, ask_for_a_petabyte])
    def test_one_that_does_not_fit_alone_fails_and_the_others_are_scored(self, model, samples, alone, error):
        scorer = Scorer(model)
        with Scarce(model, lambda hidden: hidden.shape[1] > 60, error):
            results = scorer.score(samples)
        assert results[-1].status == "failed"
        assert results[-1].reason == "out of memory for 64 tokens, though alone: shorten the prompt"
        assert results[-1].log_probability is None
        equal(results[:-1], alone[:-1])

    def test_alone_it_is_tried_once_more_with_all_blocks_run_twice(self, model, asked):
        long = Sample(ids(150, 1), ids(5, 2))
        expected = one_by_one(model, [long])
        scorer = Scorer(model, memory_budget="1GiB")
        memory = scorer.memory
        asked.clear()
        with LiveMemory(model, limit=0.9 * memory.bytes(154, 1, 5, recompute=1)) as limited:
            results = scorer.score([long])
        assert limited.refused == 1
        assert limited.now == 0  # nothing of the failed pass stays
        assert [made["recompute"] for made in asked] == [0, 3]
        equal(results, expected)

    def test_a_budget_far_above_the_memory_costs_no_answer(self, model, samples, alone):
        scorer = Scorer(model, memory_budget="100GiB", max_batch_tokens=10**6)
        with LiveMemory(model, limit=1.1 * scorer.memory.bytes(63, 1, 4)) as limited:
            results = scorer.score(samples)
        assert limited.refused > 0
        equal(results, alone)

    @pytest.mark.slow
    def test_an_allocator_that_really_has_no_more(self):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, __file__], capture_output=True, text=True, check=False, env=environment
        )
        assert done.stdout.split() == ["refused", "equal"], done.stderr

    def test_other_errors_are_not_swallowed(self, model, samples):
        def broken():
            raise RuntimeError("the matrices do not fit")

        with Scarce(model, lambda _: True, broken), pytest.raises(RuntimeError, match="the matrices do not fit"):
            Scorer(model).score(samples)


class TestInterrupted:
    """Ctrl-C at any moment leaves the model as it was, and the scorer goes on."""

    @pytest.mark.parametrize("options", [{}, {"mode": "answer_only"}, {"trace": True, "semantic": True}])
    @pytest.mark.parametrize("where", ["up", "down"])
    @pytest.mark.parametrize("budget", ["1GiB", "64KiB"])
    def test_model_is_as_before(self, model, samples, where, options, budget):
        scorer = Scorer(model, memory_budget=budget)
        few = samples[:3]
        expected = scorer.score(few, **options)
        scorer.clear_prefix_cache()
        model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
        model.train()
        try:
            with unchanged(model):
                handle = interrupting(model.model.layers[1], where)
                with pytest.raises(KeyboardInterrupt):
                    scorer.score(few, **options)
                handle.remove()
        finally:
            model.eval().requires_grad_(False)
        again = scorer.score(few, **options)
        assert [r.log_grad_norm_sq for r in again] == [r.log_grad_norm_sq for r in expected]


def interrupting(block, where):
    def interrupt(*_args):
        raise KeyboardInterrupt

    def on_the_way_down(_block, _args, output):
        if output.requires_grad:
            output.register_hook(interrupt)

    return block.register_forward_hook(interrupt if where == "up" else on_the_way_down)


@pytest.fixture(scope="module")
def answers():
    """Three prompts of two lengths, with several answers each."""
    prompts = [ids(9, 1), ids(9, 2), ids(4, 3)]
    return [Sample(prompts[i % 3], ids(2 + i % 4, -i)) for i in range(8)]


class TestWhatIsAskedFor:
    def test_answer_only(self, model, answers, asked):
        results = Scorer(model).score(answers, mode="answer_only", semantic=True)
        assert len(asked) == 2
        assert sorted(len({len(p) for p, _ in made["pairs"]}) for made in asked) == [1, 1]
        for result, alone in zip(results, one_by_one(model, answers, mode="answer_only"), strict=True):
            assert result.mode == "answer_only"
            assert result.log_grad_norm_sq == pytest.approx(alone.log_grad_norm_sq, rel=1e-9)
            signals = result.signals
            assert signals.semgrad is signals.exgrad is signals.paragrad is signals.hybridgrad is None
            assert signals.log_input_grad_norm_sq is signals.log_hidden_grad is signals.hidden_position is None
            assert signals.max_entropy == pytest.approx(alone.signals.max_entropy)

    def test_a_prefix_is_computed_once(self, model, answers):
        lengths = []
        handle = model.model.register_forward_pre_hook(
            lambda _module, _args, kwargs: lengths.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        scorer = Scorer(model, max_batch_tokens=12)
        scorer.score(answers[:1], mode="answer_only")
        scorer.clear_prefix_cache()
        lengths.clear()
        scorer.score(answers, mode="answer_only")
        handle.remove()
        # Passes visit the prompt's last position and the answer but for its last token: at most 5.
        assert sorted(shape for shape in lengths if shape[0] == 1 and shape[1] in (3, 8)) == [
            (1, 3),
            (1, 8),
            (1, 8),
        ]

    def test_prefixes_count_against_the_budget(self, model, answers, asked):
        scorer = Scorer(model)
        scorer.score(answers, mode="answer_only")
        assert scorer._runner.prefixes.nbytes > 0
        kept = scorer._runner.prefixes.nbytes
        tight = Scorer(model, memory_budget=scorer.memory.bytes(8, 3, 9) + 10)
        asked.clear()
        tight.score([Sample(ids(6, 1), ids(3, i)) for i in range(3)])
        assert len(asked) == 1
        tight._runner.prefixes = scorer._runner.prefixes
        assert kept > 10
        tight.score([Sample(ids(6, 1), ids(3, i)) for i in range(3)])
        assert len(asked) > 2

    @pytest.mark.parametrize("mode", ["exact", "answer_only"])
    def test_trace_of_a_batch(self, model, answers, mode):
        results = Scorer(model).score(answers, mode=mode, trace=True)
        for result, sample in zip(results, answers, strict=True):
            assert len(result.trace.epistemic) == len(sample.answer_ids)
        for result, alone in zip(results, one_by_one(model, answers, mode=mode, trace=True), strict=True):
            assert result.trace.epistemic == pytest.approx(alone.trace.epistemic, rel=1e-9)
        one_token = [Sample(sample.prompt_ids, sample.answer_ids[:1]) for sample in answers]
        for result in Scorer(model).score(one_token, mode=mode, trace=True):
            assert result.trace.epistemic[0] == pytest.approx(result.epistemic, rel=1e-9)
            assert result.trace.aleatoric[0] == pytest.approx(result.aleatoric, rel=1e-9)
            assert result.trace.entropy[0] == pytest.approx(result.entropy, rel=1e-9)

    def test_layers_on_the_slow_path_go_one_by_one(self, model, answers, asked, monkeypatch):
        expected = one_by_one(model, answers)
        asked.clear()
        monkeypatch.delitem(registry._rules, "transformers.models.llama.modeling_llama.LlamaRMSNorm")
        results = Scorer(model).score(answers)
        assert [len(made["pairs"]) for made in asked] == [1] * len(answers)
        equal(results, expected)
        assert all("slow exact path: model.layers.0.input_layernorm" in r.warnings[0] for r in results)

    def test_progress(self, model, answers, capsys):
        Scorer(model).score(answers, progress=True)
        shown = capsys.readouterr().err
        assert "Scoring: 100%" in shown
        assert "8/8" in shown
        Scorer(model).score(answers)
        assert capsys.readouterr().err == ""


def score_with_little_address_space() -> None:
    """Twelve samples that need about 600 MiB together and 50 alone, in 150 MiB."""
    torch.set_num_threads(1)
    model = tiny(
        "llama", dtype=torch.float32, max_position_embeddings=512, hidden_size=192, intermediate_size=768
    )
    many = [Sample(ids(400, i), ids(4, -i)) for i in range(12)]
    scorer = Scorer(model, memory_budget="100GiB", max_batch_tokens=10**6)
    expected = [result for sample in many for result in scorer.score([sample])]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 150 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    real, calls = runner.gradient_pass, []
    runner.gradient_pass = lambda *args, **options: calls.append(len(args[2])) or real(*args, **options)
    results = scorer.score(many)
    print("refused" if len(calls) > 1 and calls[0] == 12 else f"not refused: {calls}")
    equal(results, expected, rel=1e-5)
    print("equal")


if __name__ == "__main__":
    score_with_little_address_space()
