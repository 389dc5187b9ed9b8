"""What the benchmarks ask on the command line alike."""

from __future__ import annotations

import argparse
from pathlib import Path

OUTPUT = Path(__file__).parents[2] / "build" / "benchmarks"


def add_common(parser: argparse.ArgumentParser, name: str) -> None:
    """``--data``, ``--threads`` and ``--json``, whose default is named after the benchmark."""
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="prompts: JSON Lines with `question` or `turns` (may be repeated; default: a few dozen of our own)",
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument(
        "--json",
        type=Path,
        default=OUTPUT / f"{name}.json",
        metavar="FILE",
        help=f"figures and raw values; greedy answers are kept beside it (default build/benchmarks/{name}.json)",
    )
