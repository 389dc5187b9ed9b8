"""How `exact` and `answer_only` rank answers: Spearman correlation of `log_grad_norm_sq`, short and long prompts.

    python benchmarks/modes.py [--quick] [--data FILE.jsonl ...] [--threads 2] [--json FILE]

Answers are greedy. A long prompt is a question behind about 2,000 tokens of other questions, as notes. The
interval is the usual 95 % one for a rank correlation: Fisher's z with standard error
sqrt((1 + rho^2/2) / (n - 3)) (Bonett and Wright, Psychometrika 2000).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from rivals.arguments import add_common
from rivals.ours import grad_norm_sq
from rivals.samples import Source, read_prompts
from rivals.setting import facts, load_scorer
from scipy.stats import spearmanr
from transformers import AutoTokenizer

from gnuq_serve import Sample, Scorer
from gnuq_serve.demo_model import ensure_demo_model
from gnuq_serve.uncertainty import Mode

SHORT, LONG = 60, 12
QUICK_SHORT, QUICK_LONG = 16, 4
NOTES_TOKENS = 1950


def main() -> None:
    """Measure and print."""
    args = parse()
    scorer = load_scorer(args.threads)
    prompts = read_prompts(args.data)
    texts = [text for part in prompts for text in part.texts]
    tokenizer = AutoTokenizer.from_pretrained(ensure_demo_model())
    source = Source(scorer, tokenizer, prompts, args.json.parent)
    short, long = (QUICK_SHORT, QUICK_LONG) if args.quick else (min(SHORT, len(texts)), LONG)
    groups = {
        "short questions": answered(source, texts[:short]),
        "2,000-token prompts": answered(source, [behind_notes(tokenizer, texts, i) for i in range(long)]),
    }
    rows = [{"prompts": name, **compare(scorer, samples)} for name, samples in groups.items()]
    print_table(rows)
    args.json.write_text(json.dumps({"machine": facts(args.threads), "rows": rows}, indent=2) + "\n")


def answered(source: Source, texts: Sequence[str]) -> list[Sample]:
    """The texts as chats, with greedy answers of at most 50 tokens."""
    prompts = [source.chat(text) for text in texts]
    return [Sample(*pair) for pair in zip(prompts, source.greedy(prompts, 50), strict=True)]


def behind_notes(tokenizer: Any, texts: Sequence[str], number: int) -> str:
    """One of the texts behind others, different ones each time, which come round again where they are too few."""
    notes: list[str] = []
    tokens = 0
    start = number * 37
    while tokens < NOTES_TOKENS:
        text = texts[(start + 1 + len(notes)) % len(texts)]
        notes.append(f"{len(notes) + 1}. {text}")
        tokens += len(tokenizer.encode(notes[-1] + "\n", add_special_tokens=False))
    last = texts[start % len(texts)]
    return "These were asked before:\n" + "\n".join(notes) + f"\n\nAnswer this one only: {last}"


def compare(scorer: Scorer, samples: Sequence[Sample]) -> dict[str, Any]:
    """Both modes on the same samples, prompts not seen before."""
    scorer.clear_prefix_cache()
    seconds: dict[str, float] = {}
    signals: dict[str, list[float]] = {}
    modes: tuple[Mode, ...] = ("exact", "answer_only")
    for mode in modes:
        start = time.perf_counter()
        results = scorer.score(samples, mode=mode)
        seconds[mode] = time.perf_counter() - start
        signals[mode] = [math.log(grad_norm_sq(result)) for result in results]
    exact, only = signals["exact"], signals["answer_only"]
    rho = float(spearmanr(exact, only).statistic)
    low, high = interval(rho, len(samples))
    return {
        "samples": len(samples),
        "prompt_tokens": statistics.median(len(sample.prompt_ids) for sample in samples),
        "answer_tokens": statistics.median(len(sample.answer_ids) for sample in samples),
        "spearman": rho,
        "low": low,
        "high": high,
        "median_difference": statistics.median(e - o for e, o in zip(exact, only, strict=True)),
        "seconds": seconds,
        "log_grad_norm_sq": signals,
    }


def interval(rho: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a Spearman correlation."""
    if abs(rho) == 1:
        return rho, rho
    half = 1.96 * math.sqrt((1 + rho**2 / 2) / (count - 3))
    return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    print(
        "| prompts | n | prompt tokens | answer tokens | Spearman (95 %) | exact - answer_only, median "
        "| s/sample exact | s/sample answer_only |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        per_sample = [row["seconds"][mode] / row["samples"] for mode in ("exact", "answer_only")]
        print(
            f"| {row['prompts']} | {row['samples']} | {row['prompt_tokens']:.0f} | {row['answer_tokens']:.0f} "
            f"| {row['spearman']:.2f} ({row['low']:.2f} ... {row['high']:.2f}) | {row['median_difference']:+.2f} "
            f"| {per_sample[0]:.2f} | {per_sample[1]:.2f} |"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_SHORT} short and {QUICK_LONG} long prompts only"
    )
    add_common(parser, "modes")
    args = parser.parse_args()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
