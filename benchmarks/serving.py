"""What scoring costs a server, and whether it ever costs an answer: real vLLM, SmolLM2 float32 on a CPU.

    python benchmarks/serving.py [--quick] [--only SECTION ...] [--json FILE]

Engine and scorer have one thread each; the client is a third process. Sections:

* first_token: time to the first token with scoring on and off, one request at a time;
* load: requests at random times at half of the engine's capacity, with scoring off and on, and with a scorer that
  yields to the engine;
* cpu: processor seconds of a score, against self-consistency with ten samples, prefix caching on;
* soak: mixed requests (streamed, not, n=2, scoring off, hang-ups, malformed) with a queue of 16;
* kills: the scorer process killed under load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from load import kills, open_loop, self_consistency, soak, ttft
from load.client import Client, client_of
from load.server import HEADERS, serving
from rivals.arguments import OUTPUT
from rivals.contention import TOLERATED, Contention
from rivals.setting import facts

from gnuq_serve.managed_server import ManagedServer

Section = dict[str, Any]
DEADLINE = 30.0


class Sizes:
    """How much of each; ``--quick`` takes about ten minutes on two cores, all of it an hour."""

    def __init__(self, quick: bool) -> None:
        self.pairs = 15 if quick else 100
        self.capacity_seconds = 15 if quick else 60
        self.load_seconds = 30 if quick else 180
        self.answers = 6 if quick else 24
        self.long_answers = 2 if quick else 8
        self.requests, self.first = (200, 60) if quick else (2000, 200)
        self.kills = 3 if quick else 10


def first_token(folder: Path, sizes: Sizes) -> Section:
    """Scored and not, in turn."""
    return on_server(folder, [], lambda client, _: ttft.measure(client, sizes.pairs))


def load(folder: Path, sizes: Sizes) -> Section:
    """Half of the capacity; off and on on each of two servers."""

    async def measure(client: Client, rate: float) -> list[Section]:
        return [
            {"scored": scored, **await open_loop.load(client, rate, sizes.load_seconds, scored=scored, seed=4)}
            for scored in (False, True)
        ]

    async def first(client: Client, _running: ManagedServer) -> Section:
        await open_loop.capacity(client, 3)
        most = await open_loop.capacity(client, sizes.capacity_seconds)
        return {"capacity_requests_a_second": most, "as_it_comes": await measure(client, most / 2)}

    found = on_server(folder, [], first)
    rate = found["capacity_requests_a_second"] / 2
    yielding = on_server(folder, ["--gnuq-yield-to-engine"], lambda client, _: measure(client, rate))
    return found | {"yielding": yielding}


def cpu(folder: Path, sizes: Sizes) -> Section:
    """Short prompts with two lengths of answers, and long prompts in both modes."""

    async def measure(client: Client, running: ManagedServer) -> list[Section]:
        rows = []
        for answers, tokens, long, at_a_time in (
            (sizes.answers, 32, False, 1),
            (sizes.answers, 64, False, 1),
            (sizes.answers, 32, False, 3),
            (sizes.long_answers, 32, True, 1),
        ):
            rows += await self_consistency.compare(
                client, running, answers=answers, tokens=tokens, long=long, at_a_time=at_a_time
            )
        return rows

    rows = on_server(folder, [], measure)
    return {
        "ways": rows,
        "times_cheaper_short": min(
            r["times_cheaper"] for r in rows if "times_cheaper" in r and r["prompt"] == "short"
        ),
    }


def mixed(folder: Path, sizes: Sizes) -> Section:
    """32 at a time, a queue of 16."""
    return on_server(
        folder,
        ["--gnuq-max-queue", "16"],
        lambda _client, running: soak.soak(
            running, HEADERS, requests=sizes.requests, at_a_time=32, first=sizes.first, tasks_at="/tasks"
        ),
    )


def killed(folder: Path, sizes: Sizes) -> Section:
    """Eight at a time."""
    return on_server(
        folder,
        ["--gnuq-deadline-seconds", str(DEADLINE)],
        lambda client, running: kills.kill_under_load(
            client, running, kills=sizes.kills, at_a_time=8, deadline=DEADLINE
        ),
    )


SECTIONS: dict[str, Callable[[Path, Sizes], Section]] = {
    "first_token": first_token,
    "load": load,
    "cpu": cpu,
    "soak": mixed,
    "kills": killed,
}


def on_server(folder: Path, arguments: list[str], work: Callable[[Client, ManagedServer], Any]) -> Any:
    """The result of ``work`` on a server of its own."""

    async def go(running: ManagedServer) -> Any:
        async with client_of(running.base_url, HEADERS) as client:
            await client.until_ready()
            return await work(client, running)

    with serving(folder, *arguments) as running:
        return asyncio.run(go(running))


def main() -> None:
    """Measure, print each section as soon as it is there, write the file after each."""
    args = parse()
    setting = {"machine": facts(1), "quick": args.quick}
    measured: dict[str, Section] = {}
    with tempfile.TemporaryDirectory(prefix="gnuq-load-") as folder:
        for name in args.only or SECTIONS:
            print(f"\n== {name}: {SECTIONS[name].__doc__}", flush=True)
            start, contention = time.perf_counter(), Contention()
            try:
                measured[name] = SECTIONS[name](Path(folder), Sizes(args.quick))
            except BaseException:
                for log in Path(folder).glob("*.log"):
                    print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
                raise
            measured[name]["machine_used_by_others"] = others = contention.share()
            print(json.dumps(without_raw(measured[name]), indent=1))
            if others > TOLERATED:
                print(f"NOT QUIET: other processes used {others:.0%} of the machine; these times mean little.")
            print(f"({time.perf_counter() - start:.0f} s)", flush=True)
            args.json.write_text(json.dumps({**setting, "headline": headline(measured), **measured}, indent=2))
    print(json.dumps(headline(measured), indent=2))


def headline(measured: dict[str, Section]) -> dict[str, Any]:
    """The figures that stand for the rest; those that were measured."""
    found: dict[str, Any] = {}
    if section := measured.get("first_token"):
        found["first_token_ratio"] = section["ratio"]
    if section := measured.get("load"):
        for name in ("as_it_comes", "yielding"):
            off, on = section[name]
            found[f"p99_gap_on_over_off_{name}"] = on["inter_token_p99"] / off["inter_token_p99"]
            found[f"throughput_on_over_off_{name}"] = on["tokens_a_second"] / off["tokens_a_second"]
    if section := measured.get("cpu"):
        found["times_cheaper_than_ten_samples"] = section["times_cheaper_short"]
    if section := measured.get("soak"):
        keys = ("complaints", "memory_ratio", "more_fds", "more_threads", "more_tasks")
        found |= {f"soak_{key}": section[key] for key in keys}
    if section := measured.get("kills"):
        found |= {f"kills_{key}": section[key] for key in ("lost", "late", "statuses_afterwards")}
    return found


def without_raw(section: Section) -> Section:
    """For people."""
    return {name: value for name, value in section.items() if not name.startswith("raw")}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="about ten minutes on two cores: fewer of everything"
    )
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="this section (may be repeated)")
    parser.add_argument(
        "--json", type=Path, default=OUTPUT / "serving.json", metavar="FILE", help="default build/benchmarks/"
    )
    args = parser.parse_args()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
