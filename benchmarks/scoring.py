"""Time and memory of the batch scorer, side by side with other ways to the same number, SmolLM2 float32 on a CPU.

    python benchmarks/scoring.py [--quick] [--data FILE.jsonl ...] [--threads 2] [--repeats N] [--json FILE]

All methods are given the same samples and take turns; figures are medians, raw repeats are in the JSON file.

* naive loop: forward (logits at all positions), `backward()`, sum of squares of every `.grad`, `zero_grad()`,
  one sample at a time;
* torch.func: `vmap(grad(functional_call))`, as many samples at a time as fit in memory;
* Opacus ghost norms: on an untied copy of the model, which is another model with another norm;
* forward only: in our batches, logits at answer positions only;
* limit: the same, and a backward pass to the input embeddings with frozen weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from rivals import sections, tables
from rivals.arguments import add_common
from rivals.samples import Source, read_prompts
from rivals.sections import Bench, Record
from rivals.setting import facts, load_scorer
from transformers import AutoTokenizer

from gnuq_serve.demo_model import ensure_demo_model

SECTIONS = {
    "batches": sections.batches,
    "lengths": sections.lengths,
    "growth": sections.growth,
    "memory": sections.memory,
    "trace": sections.trace,
    "long": sections.long_prompt,
    "semantic": sections.semantic,
}
NOT_QUICK = ("lengths", "growth")


def main() -> None:
    """Measure, print each section as soon as it is there, write the file after each."""
    args = parse()
    setting: dict[str, Any] = {"machine": facts(args.threads), "repeats": args.repeats, "quick": args.quick}
    print(", ".join(f"{name} {value}" for name, value in setting["machine"].items()))
    measured: dict[str, list[Record]] = {}
    scorer = load_scorer(args.threads)
    prompts = read_prompts(args.data)
    source = Source(scorer, AutoTokenizer.from_pretrained(ensure_demo_model()), prompts, args.json.parent)
    bench = Bench(scorer, source, prompts, args.threads, args.repeats, args.quick)
    for name in args.only or [name for name in SECTIONS if not (args.quick and name in NOT_QUICK)]:
        print(f"\n== {name}: {(SECTIONS[name].__doc__ or '').partition(chr(10))[0]}", flush=True)
        start = time.perf_counter()
        measured[name] = SECTIONS[name](bench)
        tables.show(name, measured[name])
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)
        results = {**setting, **headline(measured), "sections": measured}
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(headline(measured), indent=2))


def headline(measured: dict[str, list[Record]]) -> dict[str, float | None]:
    """The figures that stand for the rest, the worst of those that apply; None where nothing was measured."""
    timed = [record for name in ("batches", "lengths") for record in measured.get(name, [])]
    full = [record for record in timed if record["samples"] == sections.BATCH]

    def worst(records: list[Record], field: str, pick: Callable[..., float | None]) -> float | None:
        return pick((r[field] for r in records if r.get(field) is not None), default=None)

    def only(section: str, field: str) -> float | None:
        records = measured.get(section) or [{}]
        return records[0].get(field)

    return {
        "throughput_vs_naive": worst([r for r in full if r["tokens_longest"] <= 96], "throughput_vs_naive", min),
        "time_vs_limit": worst([r for r in full if r["tokens_longest"] <= 128], "time_vs_limit", max),
        "extra_memory_vs_naive": worst(measured.get("memory", []), "extra_memory_vs_naive", max),
        "trace_vs_loop": only("trace", "trace_vs_loop"),
        "trace_vs_kept_graph": only("trace", "trace_vs_kept_graph"),
        "answer_only_cold": only("long", "answer_only_cold"),
        "answer_only_cached": only("long", "answer_only_cached"),
        "peak_gib_exact_2000": only("long", "peak_gib_exact"),
        "semantic_cost": only("semantic", "semantic_cost"),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three minutes on two cores: fewer sizes")
    add_common(parser, "scoring")
    parser.add_argument("--repeats", type=int, help="default 3; with --quick 1")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="this section (may be repeated)")
    args = parser.parse_args()
    args.repeats = args.repeats or (1 if args.quick else 3)
    if args.repeats < 1 or args.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
