"""Peak memory beyond the weights: one gradient pass beside the naive loop, SmolLM2-135M-Instruct, float32, CPU.

The naive loop is what one writes first: ``backward()`` for each sample, the sum of squares of every parameter's
gradient, ``zero_grad(set_to_none=True)``. Each measurement has a process of its own: it loads the model, scores a
tiny sample by the same method, reads its resident memory, scores, and reads ``ru_maxrss``. Linux only.

    python benchmarks/memory.py [--quick] [--json FILE]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = (50, 200)
ANSWER_TOKENS = 20
METHODS = ("gradient pass", "naive loop")
# glibc raises its mmap threshold as large blocks are freed, and then keeps what later ones leave behind: the
# warm-up's freed gradients would be taken for memory in use. A fixed threshold returns large blocks at once.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help=f"{SIZES[0]} tokens only")
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        method, tokens = arguments.measure
        print(json.dumps(measure(method, int(tokens))))
        return

    rows = []
    for tokens in SIZES[:1] if arguments.quick else SIZES:
        ours, naive = (measure_in_subprocess(method, tokens) for method in METHODS)
        rows.append(
            {
                "tokens": tokens,
                "answer_tokens": ANSWER_TOKENS,
                "weights_mib": ours["weights_mib"],
                "pass_mib": ours["peak_mib"],
                "naive_mib": naive["peak_mib"],
                "memory_ratio": ours["peak_mib"] / naive["peak_mib"],
                "pass_seconds_informational": ours["seconds"],
                "naive_seconds_informational": naive["seconds"],
                "relative_difference": abs(ours["norm_sq"] / naive["norm_sq"] - 1),
            }
        )
    print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"Peak memory beyond the weights ({rows[0]['weights_mib']:.0f} MiB), batch 1, float32, one thread\n")
    print("tokens   pass MiB   naive MiB   pass/naive   pass s*   naive s*   norms differ by")
    for row in rows:
        print(
            f"{row['tokens']:6d}{row['pass_mib']:11.1f}{row['naive_mib']:12.1f}{row['memory_ratio']:13.3f}"
            f"{row['pass_seconds_informational']:10.2f}{row['naive_seconds_informational']:11.2f}"
            f"{row['relative_difference']:18.1e}"
        )
    print("\n* one run each, informational")


def measure_in_subprocess(method: str, tokens: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", method, str(tokens)]
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure(method: str, tokens: int) -> dict[str, float]:
    import torch

    from gnuq_serve.demo_model import ensure_demo_model
    from gnuq_serve.gradnorm import cover, gradient_pass
    from gnuq_serve.weights import load_checkpoint

    torch.set_num_threads(1)
    model = load_checkpoint(str(ensure_demo_model()), dtype="float32", device="cpu")
    coverage = cover(model)

    def gradient_pass_score(prompt: list[int], answer: list[int]) -> float:
        return gradient_pass(model, coverage, [(prompt, answer)]).grad_norm_sq.item()

    def naive_score(prompt: list[int], answer: list[int]) -> float:
        model.zero_grad(set_to_none=True)
        ids = torch.tensor([[*prompt, *answer]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).sum().backward()
        norm_sq = sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None)
        model.zero_grad(set_to_none=True)
        return norm_sq

    if method == METHODS[0]:
        score = gradient_pass_score
    else:
        model.requires_grad_(True)
        score = naive_score
    # No pad token among them: autograd drops its row.
    ids = torch.randint(100, 40_000, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    score(ids[:2], ids[2:4])
    forget_peak()
    before = resident_mib()
    start = time.perf_counter()
    norm_sq = score(ids[:-ANSWER_TOKENS], ids[-ANSWER_TOKENS:])
    seconds = time.perf_counter() - start
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    return {"peak_mib": peak_mib() - before, "weights_mib": weights, "seconds": seconds, "norm_sq": norm_sq}


def forget_peak() -> None:
    """Linux: let the peak start anew from here; loading may have had a higher one."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
