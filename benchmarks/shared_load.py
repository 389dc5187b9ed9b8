"""Does a scorer that reads the engine's own weights leave the engine as it is? A load of requests, on a CPU.

python benchmarks/shared_load.py [--requests 500] [--chats 16] [--tokens 16]

Greedy answers of `gnuq-serve serve --gnuq-scorer-weights shared`, every one scored, beside those of plain vLLM
with the same loader; and the checksum of the engine's weights before and after.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from built_in_prompts import QUESTIONS

from gnuq_serve.demo_model import NAME, OFFLINE, ensure_demo_model
from gnuq_serve.managed_server import CPU_ENVIRONMENT, HOST, ManagedServer, free_port
from gnuq_serve.vllm.names import EXTENSION, LOAD_FORMAT

OURS = [str(Path(sys.executable).with_name("gnuq-serve")), "serve", "--gnuq-scorer-weights", "shared"]
PLAIN = [sys.executable, "-m", "gnuq_serve.vllm.server_main"]
PLAIN += ["--load-format", LOAD_FORMAT, "--worker-extension-cls", EXTENSION]


def checksum(server: psutil.Process) -> int:
    """Of the weights that an engine shares, by its own mapping of them."""
    for process in server.children(recursive=True):
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            if "memfd:gnuq-weights" in str(link.readlink()):
                words = torch.from_file(str(link), False, link.stat().st_size // 8, dtype=torch.int64)
                return int(words[512:].sum())  # wraps round; without the first page, which holds the version
    raise AssertionError("no process of the server has the file")


@contextmanager
def serving(command: list[str], folder: Path, **environment: str) -> Iterator[ManagedServer]:
    """A server with the demo model, ready to answer; its log is in ``folder``."""
    port = free_port()
    command = [*command, str(ensure_demo_model()), "--served-model-name", NAME, "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "2048", "--host", HOST, "--port", str(port)]
    env = {**CPU_ENVIRONMENT, **OFFLINE, "MKL_NUM_THREADS": "1", **environment}
    with ManagedServer(command, env, port, folder / f"{port}.log") as running:
        running.wait_until_ready(["/health"], timeout=900)
        yield running


async def ask_all(running: ManagedServer, requests: int, chats: int, tokens: int) -> list[Any]:
    """The choice of each answer; so many at a time."""
    limit = asyncio.Semaphore(chats)
    async with httpx.AsyncClient(base_url=running.base_url, timeout=None, trust_env=False) as client:

        async def ask(number: int) -> Any:
            question = f"{number}: {QUESTIONS[number % len(QUESTIONS)]}"
            messages = [{"role": "user", "content": question}]
            body = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": tokens}
            async with limit:
                response = await client.post("/v1/chat/completions", json=body)
            return response.raise_for_status().json()["choices"][0]

        return await asyncio.gather(*map(ask, range(requests)))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--chats", type=int, default=16, help="requests at a time")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer at most")
    args = parser.parse_args()
    load = args.requests, args.chats, args.tokens
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = HOST
    with tempfile.TemporaryDirectory() as name:
        with serving(OURS, Path(name), GNUQ_DEADLINE_SECONDS="600") as running:
            running.wait_until_ready(["/v1/uncertainty/health"], timeout=900)
            server = psutil.Process(running.pid)
            before, start = checksum(server), time.monotonic()
            ours = asyncio.run(ask_all(running, *load))
            seconds, after = time.monotonic() - start, checksum(server)
        with serving(PLAIN, Path(name), VLLM_PLUGINS="") as running:
            theirs = asyncio.run(ask_all(running, *load))
    scores = collections.Counter(choice["uncertainty"]["status"] for choice in ours)
    warned = sum(bool(choice["uncertainty"]["warnings"]) for choice in ours)
    same = sum(a["message"] == b["message"] for a, b in zip(ours, theirs, strict=True))
    print(f"{args.requests} requests, {args.chats} at a time, {seconds:.0f} s: {dict(scores)}, {warned} warn")
    print(f"checksum of the engine's weights: {before:x} before, {after:x} after")
    print(f"texts identical to plain vLLM's with the same loader: {same} of {args.requests}")


if __name__ == "__main__":
    main()
