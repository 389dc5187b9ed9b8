"""What is measured: each section times or weighs several methods on the same samples and returns records.

A record is a dict that goes into the JSON file as it is: what was run, raw seconds of every repeat, and ratios
of medians.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import rivals
from gnuq_serve import Sample, Scorer
from rivals import FORWARD, FUNC, LIMIT, NAIVE, OPACUS, OURS
from rivals.ours import GradientPass
from rivals.peak import peak_mib
from rivals.samples import Prompts, Source
from rivals.timing import Timings, interleaved
from rivals.token_traces import KeptGraph, PassPerToken

BATCH = 16
SHORT, LONG = 96, 320  # prompt and answer together, in tokens
QUICK_PART = 4  # samples that the slowest rivals get with --quick

Record = dict[str, Any]


@dataclass(slots=True)
class Bench:
    """What every section needs."""

    scorer: Scorer
    source: Source
    prompts: list[Prompts]
    threads: int
    repeats: int
    quick: bool

    def time(self, samples: Sequence[Sample], names: Sequence[str], *, once: Sequence[str] = ()) -> Record:
        """Time rivals: raw seconds, medians, ratios, and by how much norms differ from the naive loop's.

        Methods in ``once`` are timed in the first round only; with ``quick`` on the first few samples, and their
        time is scaled up.
        """
        methods: dict[str, rivals.Rival] = {name: rivals.build(name, self.scorer) for name in names}
        for method in methods.values():
            prepare = getattr(method, "prepare", None)
            prepare(samples) if prepare else method(samples[:1])
        part = min(QUICK_PART, len(samples)) if self.quick else len(samples)
        calls: dict[str, Callable[[], list[float]]] = {
            name: partial(method, samples[:part] if name in once else samples) for name, method in methods.items()
        }
        timings = interleaved(calls, self.repeats, once=frozenset(once))
        for name in once:
            timings.seconds[name] = [len(samples) / part * seconds for seconds in timings.seconds[name]]
        lengths = [len(sample.prompt_ids) + len(sample.answer_ids) for sample in samples]
        return {
            "samples": len(samples),
            "tokens_longest": max(lengths),
            "tokens_mean": sum(lengths) / len(lengths),
            "answer_tokens_mean": sum(len(sample.answer_ids) for sample in samples) / len(samples),
            "scaled_up": dict.fromkeys(once, len(samples) / part) if part < len(samples) else {},
            **timings.record(),
            "throughput_vs_naive": timings.ratio(NAIVE, OURS),
            "time_vs_limit": timings.ratio(OURS, LIMIT),
            "norms_differ_from_naive": _differences(timings),
        }


def batches(bench: Bench) -> list[Record]:
    """Every rival on 16 prompts with greedy answers: short ones of each file, then longer answers."""
    names = list(rivals.ALL)
    if importlib.util.find_spec("opacus") is None:
        print("opacus not installed: skipped (pip install 'gnuq-serve[bench]')")
        names.remove(OPACUS)
    slowest = [name for name in (FUNC, OPACUS) if name in names]
    records = []
    for longest, answer_tokens in ((SHORT, 48),) if bench.quick else ((SHORT, 48), (LONG, 128)):
        for prompts in bench.prompts[:1] if bench.quick else bench.prompts:
            try:
                samples = bench.source.answered(
                    prompts.texts, BATCH, answer_tokens=answer_tokens, longest=longest
                )
            except ValueError as error:
                print(f"{prompts.name}, up to {longest} tokens: skipped, {error}")
                continue
            record = bench.time(samples, names, once=slowest if bench.quick or longest > SHORT else ())
            records.append({"group": f"{prompts.name}, up to {longest} tokens", **record})
    return records


def lengths(bench: Bench) -> list[Record]:
    """Real text cut to exact lengths; up to 200 tokens in batches of 16."""
    names = (OURS, NAIVE, FORWARD, LIMIT)
    counts = {64: BATCH, 96: BATCH, 128: BATCH, 200: BATCH, 512: 4, 1024: 2, 2048: 1}
    return [
        {"group": f"{length} tokens", **bench.time(bench.source.exact_length(length, count), names)}
        for length, count in counts.items()
    ]


def growth(bench: Bench) -> list[Record]:
    """By number of samples at 96 tokens, then by answer length behind 64 prompt tokens."""
    names = (OURS, NAIVE, LIMIT)
    records = []
    for count in (1, 2, 4, 8, 16, 32):
        record = bench.time(bench.source.exact_length(96, count), names)
        records.append({"group": f"batch of {count}, 96 tokens", **record})
    for answer in (1, 8, 32, 128, 384):
        record = bench.time(bench.source.exact_length(64 + answer, 4, answer_tokens=answer), names)
        records.append({"group": f"batch of 4, answer of {answer}", **record})
    return records


def memory(bench: Bench) -> list[Record]:
    """Peak memory beyond the weights, each figure from a process of its own; then batches under a budget.

    Opacus's untied copy counts as its weights.
    """
    everything = [name for name in rivals.ALL if name != OPACUS or importlib.util.find_spec("opacus")]
    plan: dict[int, Sequence[str]] = {96: everything} | dict.fromkeys((200, 512, 2048), (OURS, NAIVE, LIMIT))
    records: list[Record] = []
    for length, names in ({96: (OURS, NAIVE)} if bench.quick else plan).items():
        samples = bench.source.exact_length(length, 1)
        mib = {name: peak_mib(name, samples, threads=bench.threads) for name in names}
        ratio = mib[OURS] / mib[NAIVE]
        records.append({"group": f"batch of 1, {length} tokens", "mib": mib, "extra_memory_vs_naive": ratio})
    if bench.quick:
        return records
    samples = bench.source.exact_length(200, BATCH)
    for option in ("max_batch_tokens=512", "max_batch_tokens=2048", "memory_budget=256MiB", "memory_budget=1GiB"):
        name, _, value = option.partition("=")
        options = {name: int(value) if value.isdigit() else value}
        peak = peak_mib(OURS, samples, threads=bench.threads, scorer_options=options)
        records.append({"group": f"{BATCH} samples, 200 tokens, {option}", "mib": {OURS: peak}})
    return records


def trace(bench: Bench) -> list[Record]:
    """Every token's squared gradient norm of a 48-token answer behind 48 prompt tokens.

    Quick: the rivals take every twelfth token only, and their time is scaled up.
    """
    step = 12 if bench.quick else 1
    sample = bench.source.exact_length_greedy(48, 48)
    tokens = range(0, len(sample.answer_ids), step)
    model = bench.scorer.model
    plain: dict[str, Callable[[], Any]] = {
        "pass per token": partial(PassPerToken(model), sample, tokens),
        "pass per token, prefix only": partial(PassPerToken(model, prefix_only=True), sample, tokens),
        "backward per token, kept graph": partial(KeptGraph(model), sample, tokens),
    }
    ours = {
        OURS: lambda: bench.scorer.score([sample], trace=True)[0].trace,
        f"{OURS}, no trace": lambda: bench.scorer.score([sample])[0],
    }
    timings = interleaved(ours | plain, bench.repeats)
    traced = timings.values[OURS].epistemic  # of p_t, not of its logarithm
    for name in plain:
        timings.seconds[name] = [step * seconds for seconds in timings.seconds[name]]
    differ = {
        name: max(abs(traced[t] / norm - 1) for t, norm in zip(tokens, timings.values[name], strict=True))
        for name in plain
    }
    loop, prefix, kept = plain
    peak = {}
    if not bench.quick:
        peak["peak_mib"] = peak_mib(OURS, [sample], threads=bench.threads, score_options={"trace": True})
    return [
        {
            "group": "trace of 48 tokens, 96 in all",
            "every_nth_token_of_rivals": step,
            **timings.record(),
            "trace_vs_loop": timings.ratio(loop, OURS),
            "trace_vs_prefix_loop": timings.ratio(prefix, OURS),
            "trace_vs_kept_graph": timings.ratio(kept, OURS),
            **peak,
            "differ_from_ours": differ,
        }
    ]


def long_prompt(bench: Bench) -> list[Record]:
    """A 2,000-token prompt with a 50-token answer: both modes, and their peak memory.

    "Cached" scores another answer to the prompt of the call before, which is not timed.
    """
    (sample,) = bench.source.exact_length(2050, 1, answer_tokens=50)
    other = Sample(sample.prompt_ids, sample.answer_ids[::-1])
    exact, only = GradientPass(bench.scorer), GradientPass(bench.scorer, mode="answer_only")
    cold, cached = "answer_only, cold", "answer_only, cached"
    exact(bench.source.exact_length(32, 1))
    only(bench.source.exact_length(32, 1))

    def fill() -> None:
        bench.scorer.clear_prefix_cache()
        only([sample])

    timings = interleaved(
        {"exact": partial(exact, [sample]), cold: partial(only, [sample]), cached: partial(only, [other])},
        bench.repeats,
        before={cold: bench.scorer.clear_prefix_cache, cached: fill},
    )
    bench.scorer.clear_prefix_cache()
    modes = ("exact",) if bench.quick else ("exact", "answer_only")
    peaks = {
        f"peak_gib_{mode}": peak_mib(OURS, [sample], threads=bench.threads, score_options={"mode": mode}) / 1024
        for mode in modes
    }
    return [
        {
            "group": "2,000-token prompt, 50-token answer",
            **timings.record(),
            "answer_only_cold": timings.ratio("exact", cold),
            "answer_only_cached": timings.ratio("exact", cached),
            **peaks,
        }
    ]


def semantic(bench: Bench) -> list[Record]:
    """What ``semantic=True`` adds to 16 short samples (quick: 4)."""
    samples = bench.source.exact_length(96, 4 if bench.quick else BATCH)
    plain, more = GradientPass(bench.scorer), GradientPass(bench.scorer, semantic=True)
    timings = interleaved({"plain": partial(plain, samples), "semantic": partial(more, samples)}, bench.repeats)
    return [
        {
            "group": f"semantic=True, batch of {len(samples)}, 96 tokens",
            **timings.record(),
            "semantic_cost": timings.ratio("semantic", "plain"),
        }
    ]


def _differences(timings: Timings) -> dict[str, float]:
    # Opacus has the untied model's norm: another number.
    comparable = [n for n in timings.values if n not in (NAIVE, OPACUS, *rivals.VALUELESS)]
    if NAIVE not in timings.values:
        return {}
    naive = timings.values[NAIVE]
    return {  # a rival may have been given the first few samples only
        name: max(abs(found / right - 1) for found, right in zip(timings.values[name], naive, strict=False))
        for name in comparable
    }
