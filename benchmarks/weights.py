"""What each source of the scorer's weights costs: memory of the scorer's own, and speed of the engine.

    python benchmarks/weights.py [--quick] [--json FILE]

A bfloat16 checkpoint of SmolLM2 served by vLLM in float32 on a CPU, one server for each source, all at the same
time and measured in turn, so that a busy machine hurts all alike:

* checkpoint: cast while it is loaded, a copy in the scorer's own memory;
* auto: the checkpoint, mapped from a file that was converted once;
* shared: vLLM's own tensors (its linear weights stay unpacked).

Memory is read after the scorer has scored, and is at rest. USS counts pages that no other process maps: those of
a mapped file too, which the kernel takes back when it needs them, and which stay in the page cache when a scorer
ends. They are given by themselves. The same process without its weights is taken off.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from built_in_prompts import QUESTIONS
from load.client import Client, client_of
from load.prompts import chat, questions
from load.server import HEADERS, scorer_of, serving
from rivals.contention import TOLERATED, Contention
from rivals.setting import facts
from transformers import AutoConfig, AutoModelForCausalLM

from gnuq_serve.cache import default_cache
from gnuq_serve.demo_model import ensure_demo_model
from gnuq_serve.managed_server import ManagedServer
from gnuq_serve.service.scorer.client import ScorerClient
from gnuq_serve.service.scorer.messages import ScorerConfig
from gnuq_serve.weights import load_checkpoint
from gnuq_serve.weights.room import weight_bytes

SOURCES = ("checkpoint", "auto", "shared")
MIB = 2**20
DEMO = default_cache()


def bfloat16_checkpoint(folder: Path) -> Path:
    """The demo model's weights rounded to bfloat16, with its tokenizer."""
    demo, path = ensure_demo_model(DEMO), folder / "SmolLM2-bfloat16"
    load_checkpoint(str(demo), dtype="bfloat16", device="cpu").save_pretrained(path)
    for file in demo.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, path)
    return path


def memory(process: psutil.Process) -> dict[str, float]:
    """In MiB: USS, and the part of it that are pages of mapped files."""
    regions = process.memory_maps(grouped=False)
    uss = sum(region.private_clean + region.private_dirty for region in regions)
    own = sum(region.anonymous for region in regions)
    return {"uss": uss / MIB, "of_files": max(0, uss - own) / MIB}


async def without_weights(folder: Path, threads: int = 1) -> dict[str, float]:
    """The memory of a scorer process of its own, weights left out, after it has scored.

    With one layer of the demo model at random: passes of the same width leave the same buffers behind.
    """
    config = AutoConfig.from_pretrained(ensure_demo_model(DEMO))
    config.num_hidden_layers = 1
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "small")
    path = str(folder / "small")
    before = set(psutil.Process().children())
    client = ScorerClient(ScorerConfig(model=path, served_model=path, device="cpu", threads=threads))
    client.start()
    try:
        await client.score([1] * 30, [2] * 30, 300.0)
        (process,) = set(psutil.Process().children()) - before
        await asyncio.sleep(1)
        found = memory(process)  # the file of the weights is mapped
        return {"uss": found["uss"] - found["of_files"], "of_files": 0.0}
    finally:
        await client.stop()


async def scores(running: ManagedServer, count: int) -> list[dict[str, Any]]:
    """Of the same answers, given as text: every scorer reads the same tokens."""
    async with httpx.AsyncClient(base_url=running.base_url, headers=HEADERS, timeout=600) as http:
        found = []
        for question in islice(QUESTIONS, count):
            body = {
                "messages": [{"role": "user", "content": question}],
                "answer": "I think that the answer is: it depends on whom you ask.",
            }
            found.append((await http.post("/v1/uncertainty", json=body)).raise_for_status().json())
    return found


async def tokens_a_second(client: Client, at_a_time: int, tokens: int, seed: int) -> float:
    """Generated tokens a second, unscored."""
    bodies = [chat(question, tokens, uncertainty=False) for question in islice(questions(seed), at_a_time)]
    start = time.monotonic()
    replies = await asyncio.gather(*map(client.ask, bodies))
    seconds = time.monotonic() - start
    assert all(reply.complete for reply in replies)
    return at_a_time * tokens / seconds


def difference(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> dict[str, float]:
    """Largest difference of the log-probability and of the logarithm of the squared gradient norm."""
    names = ("log_probability", "log_grad_norm_sq")
    pairs = list(zip(found, expected, strict=True))
    return {name: max(abs(one[name] - other[name]) for one, other in pairs) for name in names}


async def compare(folder: Path, sources: list[str], *, quick: bool) -> dict[str, Any]:
    """All sources side by side."""
    model = bfloat16_checkpoint(folder)
    count, rounds, tokens = (8, 3, 32) if quick else (20, 5, 64)
    result: dict[str, Any] = {"without_weights_mib": await without_weights(folder)}
    async with AsyncExitStack() as stack:
        servers: dict[str, ManagedServer] = {}
        clients: dict[str, Client] = {}
        for source in sources:
            flags = ("--gnuq-scorer-weights", source)
            running = stack.enter_context(serving(folder, *flags, model=model))
            servers[source] = running
            clients[source] = await stack.enter_async_context(client_of(running.base_url, HEADERS))
            await clients[source].until_ready()
        scored = {source: await scores(running, count) for source, running in servers.items()}
        await asyncio.sleep(2)
        for source, running in servers.items():
            process = scorer_of(running)
            assert process is not None
            result[source] = {
                "memory_mib": memory(process),
                "difference": difference(scored[source], scored[sources[0]]),
                "fingerprint": scored[source][0]["fingerprint"],
            }
        for at_a_time in (16, 1):
            speeds: dict[str, list[float]] = {source: [] for source in sources}
            for number in range(rounds + 1):
                for source, client in clients.items():
                    speed = await tokens_a_second(client, at_a_time, tokens, number)
                    if number:  # the first is a warm-up
                        speeds[source].append(speed)
            for source in sources:
                result[source][f"tokens_a_second_at_{at_a_time}"] = speeds[source]
    return result


def report(found: dict[str, Any], sources: list[str]) -> None:
    """A table in Markdown."""
    base = found["without_weights_mib"]
    model = load_checkpoint(str(ensure_demo_model(DEMO)), dtype="float32", device="cpu")
    weights = weight_bytes(model) / MIB
    print(f"weights {weights:.0f} MiB; the process without them {base['uss']:.0f} MiB\n")
    print(
        "| scorer's weights | USS over that | of it, pages of a mapped file | its own | share of the weights "
        "| largest difference of log-probability, log grad norm² | tokens a second at 16 chats | at one |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for source in sources:
        one = found[source]
        over = one["memory_mib"]["uss"] - base["uss"]
        of_files = one["memory_mib"]["of_files"] - base["of_files"]
        own = over - of_files
        apart = one["difference"]
        speeds = [statistics.median(one[f"tokens_a_second_at_{n}"]) for n in (16, 1)]
        print(
            f"| {source} | {over:+.0f} MiB | {of_files:.0f} MiB | {own:+.0f} MiB | {own / weights:.1%} "
            f"| {apart['log_probability']:.1e}, {apart['log_grad_norm_sq']:.1e} "
            f"| {speeds[0]:.1f} | {speeds[1]:.1f} |"
        )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few answers and rounds")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    contention = Contention()
    ensure_demo_model(DEMO)
    with tempfile.TemporaryDirectory(dir=DEMO) as folder:  # on a disk: files in memory would save none
        os.environ["GNUQ_CACHE"] = folder
        found = asyncio.run(compare(Path(folder), args.sources, quick=args.quick))
    share = contention.share()
    report(found, args.sources)
    if share > TOLERATED:
        print(f"\nothers used {share:.0%} of the machine meanwhile: speeds are comparable side by side only")
    if args.json:
        args.json.write_text(json.dumps(facts(1) | found, indent=1))


if __name__ == "__main__":
    main()
