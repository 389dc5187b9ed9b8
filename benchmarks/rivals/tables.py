"""Records as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rivals import LIMIT, NAIVE, OURS
from rivals.contention import TOLERATED

Record = dict[str, Any]
Titled = tuple[str, Table]
WIDTH = 110


def show(section: str, records: Sequence[Record]) -> None:
    """Print one section."""
    console = Console(width=WIDTH, highlight=False)
    for title, table in _TABLES.get(section, _one_by_one)(records):
        if title:
            console.print(title)
        console.print(table)
    others = max((record.get("machine_used_by_others", 0.0) for record in records), default=0.0)
    if others > TOLERATED:
        console.print(f"NOT QUIET: other processes used {others:.0%} of the machine; these times mean little.")


def _rivals(records: Sequence[Record]) -> list[Titled]:
    tables = []
    for record in records:
        title = (
            f"{record['group']}: batch of {record['samples']}, {record['tokens_mean']:.0f} tokens "
            f"({record['answer_tokens_mean']:.0f} of answer) on average"
        )
        if record["scaled_up"]:
            title += "; * timed on a few of them and scaled up"
        table = _table("method", "seconds", "samples/s", "against naive", "/ limit", "norms differ by")
        for name, seconds in record["median_seconds"].items():
            medians = record["median_seconds"]
            differ = record["norms_differ_from_naive"].get(name)
            table.add_row(
                f"{name} *" if name in record["scaled_up"] else name,
                f"{seconds:.2f}",
                f"{record['samples'] / seconds:.2f}",
                f"{medians[NAIVE] / seconds:.2f} x",
                f"{seconds / medians[LIMIT]:.2f}",
                "" if differ is None else f"{differ:.0e}",
            )
        tables.append((title, table))
    return tables


def _sizes(records: Sequence[Record]) -> list[Titled]:
    names = list(records[0]["median_seconds"])
    columns = ("samples", *(f"{name} s" for name in names), "s/sample", "against naive", "/ limit")
    table = _table("", *columns)
    for record in records:
        medians = record["median_seconds"]
        faster = record["throughput_vs_naive"]
        table.add_row(
            record["group"],
            str(record["samples"]),
            *(f"{medians[name]:.2f}" for name in names),
            f"{medians[OURS] / record['samples']:.2f}",
            "" if faster is None else f"{faster:.2f} x",
            f"{record['time_vs_limit']:.2f}",
        )
    return [("Seconds for all samples together", table)]


def _memory(records: Sequence[Record]) -> list[Titled]:
    names = list(records[0]["mib"])
    table = _table("", *names, f"{OURS} / naive")
    for record in records:
        ratio = record.get("extra_memory_vs_naive")
        cells = [f"{record['mib'][name]:.0f}" if name in record["mib"] else "" for name in names]
        table.add_row(record["group"], *cells, "" if ratio is None else f"{ratio:.3f}")
    return [("Peak memory beyond the weights, MiB", table)]


def _one_by_one(records: Sequence[Record]) -> list[Titled]:
    tables = []
    for record in records:
        table = _table("", "")
        for name, seconds in record["median_seconds"].items():
            table.add_row(f"{name}, s", f"{seconds:.2f}")
        for name, value in record.items():
            if isinstance(value, float):
                table.add_row(name, f"{value:.2f}")
        for name, value in record.get("differ_from_ours", {}).items():
            table.add_row(f"differs from {name} by", f"{value:.0e}")
        tables.append((record["group"], table))
    return tables


def _table(first: str, *columns: str) -> Table:
    table = Table()
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


_TABLES = {"batches": _rivals, "lengths": _sizes, "growth": _sizes, "memory": _memory}
