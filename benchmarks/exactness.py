"""How exact is the squared gradient norm? Largest relative error against plain autograd, printed as a table.

python benchmarks/exactness.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from gnuq_serve import Sample, Scorer
from gnuq_serve.demo_model import NAME, ensure_demo_model
from gnuq_serve.gradnorm import cover, gradient_pass
from gnuq_serve.gradnorm.oracle import Oracle

COLUMNS = {
    "float64": "float64 / autograd float64",
    "float32": "float32 / autograd float32",
    "float32_vs_float64": "float32 / autograd float64",
    "batch": "float32: batch / single",
}
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 5,
}
GPT2_SHAPE: dict[str, Any] = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
GPT2_SHAPE |= {"bos_token_id": 1, "eos_token_id": 2}


def tiny_models() -> dict[str, nn.Module]:
    """Random models with biases and norm weights that are not trivial."""
    torch.manual_seed(0)
    models = {}
    for tied in (True, False):
        kind = "tied" if tied else "untied"
        configs = {
            "Llama with bias": LlamaConfig(**SHAPE, tie_word_embeddings=tied, attention_bias=True),
            "Mistral": MistralConfig(**SHAPE, tie_word_embeddings=tied),
            "Qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=tied),
            "GPT-2": GPT2Config(**GPT2_SHAPE, tie_word_embeddings=tied),
        }
        for name, config in configs.items():
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
            models[f"{name}, {kind}"] = model
    return models


def random_samples(vocabulary: int) -> list[Sample]:
    """Eight samples of unequal length; the first has one prompt token, the second one answer token."""
    draw = random.Random(0)
    lengths = [(1, 5), (9, 1), *((draw.randint(2, 20), draw.randint(2, 30)) for _ in range(6))]
    return [
        Sample([draw.randrange(vocabulary) for _ in range(n)], [draw.randrange(vocabulary) for _ in range(t)])
        for n, t in lengths
    ]


def chat_samples(path: str) -> list[Sample]:
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
        samples.append(Sample(prompt, [*tokenizer.encode(answer, add_special_tokens=False), end]))
    return samples


def norms(model: nn.Module, samples: list[Sample], *, batched: bool) -> list[float]:
    """Squared gradient norms by our pass, in one batch or one by one."""
    coverage = cover(model)
    pairs = [(sample.prompt_ids, sample.answer_ids) for sample in samples]
    groups = [pairs] if batched else [[pair] for pair in pairs]
    return [norm for group in groups for norm in gradient_pass(model, coverage, group).grad_norm_sq.tolist()]


def errors(model: nn.Module, samples: list[Sample]) -> dict[str, float]:
    """Largest relative errors of one model, over single samples and the batch."""

    def oracle(dtype: torch.dtype) -> list[float]:
        reference = Oracle(model, dtype)
        return [reference.score(sample.prompt_ids, sample.answer_ids)[1] for sample in samples]

    def worst(found: list[float], right: list[float]) -> float:
        return max(abs(f / r - 1) for f, r in zip(found, right, strict=True))

    exact, rounded = oracle(torch.float64), oracle(torch.float32)
    model = model.float()
    single, batch = norms(model, samples, batched=False), norms(model, samples, batched=True)
    model = model.double()
    in_double = [norms(model, samples, batched=batched) for batched in (False, True)]
    return {
        "float64": max(worst(found, exact) for found in in_double),
        "float32": max(worst(found, rounded) for found in (single, batch)),
        "float32_vs_float64": max(worst(found, exact) for found in (single, batch)),
        "batch": worst(batch, single),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models only")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    results = {name: errors(model, random_samples(97)) for name, model in tiny_models().items()}
    if not args.quick:
        path = str(ensure_demo_model())
        results[f"{NAME}, real"] = errors(Scorer.from_pretrained(path).model, chat_samples(path))
    table = Table(caption="Largest relative error of the squared gradient norm; all but the last: tiny, random")
    table.add_column("model", no_wrap=True)
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for name, row in results.items():
        table.add_row(name, *(f"{row[column]:.1e}" for column in COLUMNS))
    Console(width=100).print(table)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
