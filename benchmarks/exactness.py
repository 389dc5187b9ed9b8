"""How exact is the squared gradient norm? Largest relative error against plain autograd, printed as a table.

python benchmarks/exactness.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from models import gemma3_270m
from models.architectures import ARCHITECTURES, VOCABULARY, Architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

from gnuq_serve.demo_model import NAME, ensure_demo_model
from gnuq_serve.gradnorm import cover, gradient_pass, token_grad_norms
from gnuq_serve.gradnorm.oracle import Oracle

Pair = tuple[list[int], list[int]]
COLUMNS = {
    "float64": "float64",
    "trace": "each token, float64",
    "float32": "float32",
    "batch": "float32, batch / single",
}


def random_samples() -> list[Pair]:
    """Eight samples of unequal length; the first has one prompt token, the second one answer token."""
    draw = random.Random(0)
    lengths = [(1, 5), (9, 1), *((draw.randint(2, 20), draw.randint(2, 30)) for _ in range(6))]
    return [
        ([draw.randrange(VOCABULARY) for _ in range(n)], [draw.randrange(VOCABULARY) for _ in range(t)])
        for n, t in lengths
    ]


def chat_samples(path: str) -> list[Pair]:
    """Chat prompts (the template holds the pad token) with short and long answers."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    pairs = [
        ("What is the capital of France?", "The capital of France is Paris."),
        ("2+2?", "4"),
        ("Tell me a story.", "Once upon a time there was a dog who liked the sea and the boats that went by."),
    ]
    samples = []
    for question, answer in pairs:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        end = tokenizer.eos_token_id
        samples.append((prompt, [*tokenizer.encode(answer, add_special_tokens=False), end]))
    return samples


def norms(model: Any, samples: list[Pair], *, batched: bool) -> list[float]:
    """Squared gradient norms by our pass, in one batch or one by one."""
    coverage = cover(model)
    groups = [samples] if batched else [[sample] for sample in samples]
    return [norm for group in groups for norm in gradient_pass(model, coverage, group).grad_norm_sq.tolist()]


def worst(found: list[float], right: list[float]) -> float:
    """Largest relative error."""
    return max(abs(f / r - 1) for f, r in zip(found, right, strict=True))


def errors(model: Any, samples: list[Pair], *, trace: bool) -> dict[str, Any]:
    """Largest relative errors of one model, over single samples and the batch; it ends up in float32."""
    oracle = Oracle(model)
    right = [oracle.score(*sample)[1] for sample in samples]
    each_token = oracle.token_grad_norms(*samples[-1]) if trace else None
    del oracle
    model = model.double()
    coverage = cover(model)
    found: dict[str, Any] = {
        "rules": sorted({rule.name for _, _, rule in coverage.rules} | {coverage.head_rule.name}),
        "slow": coverage.slow,
        "float64": max(worst(norms(model, samples, batched=batched), right) for batched in (False, True)),
        "trace": None,
    }
    if each_token is not None:
        found["trace"] = worst(token_grad_norms(model, coverage, samples[-1]).tolist(), each_token)
    model = model.float()
    if "experts" in found["rules"]:
        model.set_experts_implementation("grouped_mm")  # as served; it takes no float64
    single, batch = norms(model, samples, batched=False), norms(model, samples, batched=True)
    return found | {"float32": max(worst(single, right), worst(batch, right)), "batch": worst(batch, single)}


def tiny_errors(architecture: Architecture) -> dict[str, Any]:
    """The larger of the errors with head and embedding tied, and not."""
    tied, untied = (errors(architecture.build(tie), random_samples(), trace=True) for tie in (True, False))
    return tied | {key: max(tied[key], untied[key]) for key in COLUMNS}


def real_errors() -> dict[str, dict[str, Any]]:
    """Of the models with real weights that can be had here."""
    path = str(ensure_demo_model())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    results = {f"{NAME}, real weights": errors(model, chat_samples(path), trace=False)}
    if not gemma3_270m.is_installed():
        print(f"{gemma3_270m.MISSING}\n")
        return results
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = gemma3_270m.load(Path(folder))
    return results | {"Gemma 3 270M, real weights": errors(model, gemma3_270m.samples(tokenizer), trace=False)}


def table(results: dict[str, dict[str, Any]]) -> str:
    """In markdown."""

    def line(*cells: str) -> str:
        return f"| {' | '.join(cells)} |"

    rows = [
        line(
            name,
            ", ".join(row["rules"]),
            *("" if row[column] is None else f"{row[column]:.0e}" for column in COLUMNS),
        )
        for name, row in results.items()
    ]
    return "\n".join(
        [line("model", "rules", *COLUMNS.values()), line(*["---"] * 2, *["--:"] * len(COLUMNS)), *rows]
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models only")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    results = {name: tiny_errors(architecture) for name, architecture in ARCHITECTURES.items()}
    if not args.quick:
        results |= real_errors()
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
